"""Where text comes from: documents in a fixed order, their fingerprint, and which of them are held out."""

import glob
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"})


class DataError(ValueError):
    """Text that cannot be used as asked. The message names the file or the number and says what to do."""


def standard_library() -> list[str]:
    """Return the sources of the running interpreter's standard library, in order of their paths.

    Tests are left out (many distributions strip them), tables of `encodings` too, and what the build of the
    interpreter wrote about itself, so that the same Python gives the same text on every machine. The language
    reference in `pydoc_data` becomes one document a topic.

    Raises:
        DataError: There are no sources, as in a zipped or embedded Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [text for path in _sources(root) for text in _source_documents(root, path)]
    if not found:
        raise DataError(
            f"this Python has no .py files in {root} (it is zipped or embedded); "
            "use an ordinary Python, or corpus: files with your own text"
        )
    return found


def from_files(patterns: Sequence[str], field: str) -> list[str]:
    """Return the documents of the files that match the glob `patterns`, by pattern, then by path.

    A .txt file is one document; a .jsonl file has one a line and a .parquet file one a row, in `field`. A
    file that two patterns match counts once. Documents that are blank are left out.

    Raises:
        DataError: A pattern matches no file, a file has another suffix or cannot be read, or a line or row
            has no text in `field`; the message names the file and line.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = [path for path in map(Path, sorted(matches)) if path.is_file()]
        if not files:
            raise DataError(f"no file matches '{pattern}' (seen from {Path.cwd()})")
        paths.update(dict.fromkeys(files))
    return [text for path in paths for text in _read(path, field) if text.strip()]


def fingerprint(documents: Iterable[str]) -> str:
    """Return the SHA-256, in hex, over the content hashes of the documents in order."""
    whole = sha256()
    for text in documents:
        whole.update(_content_hash(text))
    return whole.hexdigest()


def split(documents: Iterable[str], held_out_every: int) -> tuple[list[str], list[str]]:
    """Return the documents to train on and those held out, about one in `held_out_every`.

    A document's own content decides, so copies stand on one side, and adding a document moves no other.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for text in documents:
        number = int.from_bytes(_content_hash(text)[:8])
        sides[number % held_out_every == 0].append(text)
    return sides


def _content_hash(text: str) -> bytes:
    return sha256(text.encode()).digest()


def _sources(root: Path) -> Iterator[Path]:
    """Yield the .py files below `root` that belong to the library, sorted by path."""
    paths = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        paths += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    yield from sorted(paths, key=lambda path: path.relative_to(root).parts)


def _source_documents(root: Path, path: Path) -> Iterator[str]:
    if path.relative_to(root).parts == ("pydoc_data", "topics.py"):
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
        return
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:  # a source in another declared encoding
        return
    if text.strip():
        yield text


def _read(path: Path, field: str) -> Iterator[str]:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: cannot read '{path.suffix}' files; use one of {', '.join(readers)}")
    try:
        yield from reader(path, field)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _read_text(path: Path, field: str) -> Iterator[str]:
    yield path.read_bytes().decode()


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(path.read_bytes().decode().split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with the field '{field}'")
        if field not in row:
            raise DataError(f"{where}: no field '{field}' (there are: {', '.join(row)}); set data.field")
        yield _checked(row[field], where, field)


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'tangram-lm[data]'") from error
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error
    with file:
        names = file.schema_arrow.names
        if field not in names:
            raise DataError(f"{path}: no column '{field}' (there are: {', '.join(names)}); set data.field")
        rows = (value for batch in file.iter_batches(columns=[field]) for value in batch.column(0).to_pylist())
        for number, value in enumerate(rows, 1):
            yield _checked(value, f"{path}: row {number}", field)


def _checked(value: object, where: str, field: str) -> str:
    """Return `value` if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: '{field}' holds half a surrogate pair at character {error.start}") from error
    return value

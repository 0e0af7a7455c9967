"""YAML to a tree that remembers where every value was written, and how such trees are laid over each other.

Only the events of ruamel.yaml's YAML 1.2 parser are used: scalars are resolved here, by the core schema, so
that no foreign type ever reaches a config, and a preset, the command line and a study read numbers alike.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

from attrs import field, frozen
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

Scalar: TypeAlias = str | int | float | bool | None
Plain: TypeAlias = Scalar | list["Plain"] | dict[str, "Plain"]
"""A value without origins, as JSON has it."""

MAX_BYTES = 250_000
MAX_VALUES = 5_000
MAX_DEPTH = 50
"""What a file may hold, so that none takes longer to read than a person waits: keys and values, and levels."""

_NULL = re.compile(r"(?:|~|null|Null|NULL)")
_BOOL = {word: word[0] in "tT" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


@frozen
class Origin:
    """Where a value comes from.

    Attributes:
        file: A file, the text of a command-line override, or `default`.
        line: Line in the file, from 1; None where there is no file.
    """

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


DEFAULT = Origin("default")


@frozen
class Node:
    """A value and where it was written; a key's line for a value in a map.

    Attributes:
        value: A scalar, or maps and lists of nodes.
        origin: Where it was written.
    """

    value: "Scalar | list[Node] | dict[str, Node]"
    origin: Origin = field(eq=False)

    def plain(self) -> Plain:
        """Return the value without origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    @classmethod
    def of(cls, value: Plain, origin: Origin) -> "Node":
        """Return a value as if all of it had been written at `origin`."""
        if isinstance(value, dict):
            return cls({key: cls.of(item, origin) for key, item in value.items()}, origin)
        if isinstance(value, list):
            return cls([cls.of(item, origin) for item in value], origin)
        return cls(value, origin)

    def child(self, step: str | int) -> "Node | None":
        """Return what lies under a key of a map or an index of a list, if anything does."""
        if isinstance(self.value, dict):
            return self.value.get(str(step))
        if isinstance(self.value, list) and str(step).isdigit() and int(step) < len(self.value):
            return self.value[int(step)]
        return None


@frozen
class Problem:
    """One thing that is wrong with a config.

    Attributes:
        origin: Where it was written; None if nowhere.
        path: Dotted path, empty for the whole.
        text: What is wrong, and what to do.
    """

    origin: Origin | None
    path: str
    text: str

    def __str__(self) -> str:
        return ": ".join(str(part) for part in (self.origin, self.path, self.text) if part)


class ConfigError(Exception):
    """What a user asked for cannot be; `problems` has all of it, and `str` a line for each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the closest of `known`, or else the list of them."""
    names = list(known)
    close = get_close_matches(word, names, n=1)
    if close:
        return f", did you mean '{close[0]}'?"
    return f" (known: {', '.join(names)})" if names else ""


def show_path(path: Path) -> str:
    """Return `path` as messages name it: relative where it lies below the working directory."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# --- reading ----------------------------------------------------------------------------------------------


def load(path: Path) -> Node:
    """Read a preset file, which holds one map.

    Raises:
        ConfigError: It is not there, or not a map in the part of YAML 1.2 that presets are written in.
    """
    file = show_path(path)
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise ConfigError([Problem(Origin(file), "", f"cannot be read: {error.strerror}")]) from None
    if size > MAX_BYTES:
        raise ConfigError([Problem(Origin(file), "", f"is larger than {MAX_BYTES:,} bytes")])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(Origin(file, line), "", "not parseable: not UTF-8")]) from None
    tree = read(text, file)
    if not isinstance(tree.value, dict):
        raise ConfigError([Problem(tree.origin, "", f"expected a map, got {describe(tree.plain())}")])
    return tree


def read(text: str, file: str, *, lines: bool = True) -> Node:
    """Read one YAML document; `file` names it in origins, and `lines` says whether it has lines to name.

    Raises:
        ConfigError: It is not parseable, or holds tags, anchors, duplicate or non-string keys, a number
            that is not finite, or more than `MAX_VALUES` values or `MAX_DEPTH` levels.
    """
    reader = _Reader(file, lines)
    try:
        return reader.read(text)
    except ConfigError:
        raise
    except MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        raise reader.error(line, "", f"not parseable: {error.problem or error.context}") from None
    except Exception as error:  # the parser lets a few of its own mistakes escape, of several types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise reader.error(0, "", f"not parseable: {reason}") from None


class _Reader:
    """Composes the tree from parser events, refusing what presets do not use."""

    def __init__(self, file: str, lines: bool) -> None:
        self._file = file
        self._lines = lines
        self._values = 0
        self._problems: list[Problem] = []

    def origin(self, line: int) -> Origin:
        return Origin(self._file, line + 1 if self._lines else None)

    def error(self, line: int, path: str, text: str) -> ConfigError:
        return ConfigError([*self._problems, Problem(self.origin(line), path, text)])

    def read(self, text: str) -> Node:
        if len(text) > MAX_BYTES:
            raise self.error(0, "", f"is larger than {MAX_BYTES:,} characters")
        events = iter(YAML(typ="safe", pure=True).parse(text))
        tree: Node | None = None
        for event in events:
            if isinstance(event, DocumentStartEvent):
                if tree is not None:
                    raise self.error(event.start_mark.line, "", "holds more than one document")
                tree = self._node(next(events), events, ())
        if self._problems:
            raise ConfigError(self._problems)
        return tree or Node(None, self.origin(0))

    def _node(self, event: Event, events: Iterator[Event], path: tuple[str, ...], line: int | None = None) -> Node:
        at: int = event.start_mark.line
        here = self.origin(at if line is None else line)
        if len(path) > MAX_DEPTH:
            raise self.error(at, "", f"is nested deeper than {MAX_DEPTH} levels")
        self._values += 1
        if self._values > MAX_VALUES:
            raise self.error(at, "", f"holds more than {MAX_VALUES:,} keys and values")
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor is not None):
            self._refuse(at, path, "anchors and aliases are not read; write the value out, or extend a preset")
        elif (tag := getattr(event, "tag", None)) is not None:
            self._refuse(at, path, f"tags such as {tag} are not read")
        if isinstance(event, MappingStartEvent):
            return Node(self._map(events, path), here)
        if isinstance(event, SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(event := next(events), SequenceEndEvent):
                items.append(self._node(event, events, (*path, str(len(items)))))
            return Node(items, here)
        if isinstance(event, ScalarEvent):
            return Node(self._scalar(event, path), here)
        return Node(None, here)

    def _map(self, events: Iterator[Event], path: tuple[str, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            line: int = event.start_mark.line
            key = self._node(event, events, (*path, "?")).value
            if not isinstance(key, str):
                shown = describe(Node(key, self.origin(line)).plain())
                self._refuse(line, path, f"keys are strings, got {shown}; quote it")
                key = str(key)
            node = self._node(next(events), events, (*path, key), line)
            if key in entries:
                self._refuse(line, (*path, key), f"the key is there twice, first at {entries[key].origin}")
            entries[key] = node
        return entries

    def _scalar(self, event: ScalarEvent, path: tuple[str, ...]) -> Scalar:
        text: str = event.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._refuse(event.start_mark.line, path, "holds half of a surrogate pair")
        if not event.implicit[0]:  # quoted
            return text
        try:
            return resolve_scalar(text)
        except ValueError as error:
            self._refuse(event.start_mark.line, path, str(error))
            return None

    def _refuse(self, line: int, path: Sequence[str], text: str) -> None:
        self._problems.append(Problem(self.origin(line), ".".join(path), text))


def resolve_scalar(text: str) -> Scalar:
    """Return the value of an unquoted scalar by the YAML 1.2 core schema; what is nothing else is a string.

    Raises:
        ValueError: A number that is not finite or does not fit in 64 bits.
    """
    if _NULL.fullmatch(text):
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        number = int(text[:25], 0 if text[:2] in ("0o", "0x") else 10)
        if len(text) > 25 or not -(2**63) <= number < 2**63:
            raise ValueError(f"{text[:25]} does not fit in 64 bits")
        return number
    if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and math.isinf(float(text))):
        raise ValueError(f"{text[:25]} is not a finite number")
    return float(text) if _FLOAT.fullmatch(text) else text


def describe(value: object) -> str:
    """Return how an error names a value that is not what was wanted."""
    if isinstance(value, dict):
        return "a map" if value else "an empty map"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# --- laying over ------------------------------------------------------------------------------------------


def merge(base: Node, patch: Node, path: str = "") -> Node:
    """Lay `patch` over `base`; `path` is where both stand, for errors.

    Maps merge deep; scalars and lists are replaced. A map whose `use` differs from the base's replaces it. A
    map of indices over a list patches those elements. A null stays, as the wish to have the value removed:
    structuring gives the field its default (None where it may be None), and drops the entry of a collection.

    Raises:
        ConfigError: An index is out of range.
    """
    if isinstance(base.value, list) and isinstance(patch.value, dict) and _are_indices(patch.value):
        return Node(_merge_items(base.value, patch.value, path), base.origin)
    if not isinstance(base.value, dict) or not isinstance(patch.value, dict) or _swaps(base, patch):
        return patch
    merged = dict(base.value)
    for key, node in patch.value.items():
        merged[key] = merge(merged[key], node, f"{path}.{key}".lstrip(".")) if key in merged else node
    return Node(merged, patch.origin)


def _are_indices(entries: Mapping[str, Node]) -> bool:
    return bool(entries) and all(re.fullmatch("[0-9]{1,9}", key) for key in entries)


def _merge_items(items: list[Node], patches: Mapping[str, Node], path: str) -> list[Node]:
    merged = list(items)
    for key, node in patches.items():
        if int(key) >= len(items):
            text = f"there is no element {key}; the list has {len(items)}, counted from 0"
            raise ConfigError([Problem(node.origin, f"{path}.{key}", text)])
        merged[int(key)] = merge(merged[int(key)], node, f"{path}.{key}")
    return merged


def _swaps(base: Node, patch: Node) -> bool:
    """Whether both say `use`, and not the same."""
    old, new = base.child("use"), patch.child("use")
    return old is not None and new is not None and old.value != new.value


def override(text: str) -> Node:
    """Read one `a.b.c=value` of the command line as a patch.

    Raises:
        ConfigError: There is no `=`, the path has an empty part, or the value is not YAML.
    """
    path, equals, value = text.partition("=")
    steps = path.strip().split(".")
    if not equals or not all(steps):
        raise ConfigError([Problem(None, "", f"'{text}' is not of the form dotted.path=value")])
    if len(steps) > MAX_DEPTH:
        raise ConfigError([Problem(None, "", f"'{steps[0]}...' is nested deeper than {MAX_DEPTH} levels")])
    node = read(value.strip(), text, lines=False)
    for step in reversed(steps):
        node = Node({step: node}, node.origin)
    return node

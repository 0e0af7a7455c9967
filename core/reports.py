"""What a run directory says of its run, read into one record. Nothing is trained and nothing is written."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, field, frozen

from tangram.core.config import ConfigError, Node, Plain, Scalar, load
from tangram.core.liveness import Piece
from tangram.core.scores import NeedleGrid, PositionLosses, TaskScore, read_grids, read_positions, read_scores

if TYPE_CHECKING:
    from tangram.core.measure import Measures

Row = Mapping[str, Scalar]
"""One line of metrics.jsonl."""


class ReportError(Exception):
    """There is nothing to report on; the message says what is missing."""


@frozen
class Setting:
    """One leaf of the resolved preset.

    Attributes:
        path: Its dotted path.
        value: Its value.
        origin: Where it was written; empty where the run does not say.
    """

    path: str
    value: Scalar
    origin: str


@frozen
class Trace:
    """One measured quantity over the run; only finite points.

    Attributes:
        x: Where it was measured.
        y: What was measured.
    """

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()


@frozen(eq=False)
class RunRecord:
    """A run as its directory tells it. What the directory does not say is empty or None.

    Attributes:
        name: Name of the experiment.
        settings: The resolved preset, leaf by leaf.
        steps: The rows of metrics.jsonl that are steps.
        evaluations: The rows that are evaluations.
        load: Tokens per expert of each layer with a router, over the whole run.
        averaged: The last evaluation with averaged weights, a row for each observer that keeps an average, by name.
        saving: What the checkpoints cost, see `tangram.core.saver.Saving`; empty where the run did not end well.
        scores: What was scored on tasks.
        grids: How hidden facts were found.
        positions: How well held-out text was predicted by position.
        pieces: What became of each named piece; empty where the run did not end well.
        sample: The continued prompt; empty where there is none.
        speculation: Share of the drafts kept at each depth, and tokens a round; empty where nothing drafts.
        command: The command line, word by word.
        versions: What the numbers depend on.
        data: Fingerprint of the data.
        start: The checkpoint whose weights the run started from; empty where they were drawn.
        references: Bits per byte of general compressors on the held-out text, by name.
        held_out_bytes: UTF-8 bytes of the held-out text; 0 where there is none.
        measures: What the model costs; None where it cannot be built here.
        gaps: What could not be read, a line each.
    """

    name: str
    settings: tuple[Setting, ...]
    steps: tuple[Row, ...] = ()
    evaluations: tuple[Row, ...] = ()
    load: Mapping[int, tuple[int, ...]] = field(factory=dict)
    averaged: Mapping[str, Row] = field(factory=dict)
    saving: Mapping[str, float] = field(factory=dict)
    scores: tuple[TaskScore, ...] = ()
    grids: tuple[NeedleGrid, ...] = ()
    positions: tuple[PositionLosses, ...] = ()
    pieces: tuple[Piece, ...] = ()
    sample: str = ""
    speculation: Mapping[str, float] = field(factory=dict)
    command: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(factory=dict)
    data: str = ""
    start: str = ""
    references: Mapping[str, float] = field(factory=dict)
    held_out_bytes: int = 0
    measures: "Measures | None" = None
    gaps: tuple[str, ...] = ()

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the losses that the steps report."""
        names = {name: None for row in self.steps for name in row if name.startswith("loss.")}
        return tuple(name.removeprefix("loss.") for name in names)

    @property
    def refused(self) -> int:
        """Steps that the guard did not accept."""
        return sum(row.get("verdict", "accept") != "accept" for row in self.steps)

    def trace(self, name: str, over: str = "tokens") -> Trace:
        """Return a quantity of the steps over another, by their names in metrics.jsonl."""
        return _trace(self.steps, over, name)

    def evaluated(self, name: str, over: str = "tokens") -> Trace:
        """Return a quantity of the evaluations over another: of those on part of the held-out text, if there are any.

        Those that were made on the way saw the same part; one on all of it at the end is of another text.
        """
        part = [row for row in self.evaluations if not row.get("eval.complete")]
        return _trace(part or self.evaluations, over, name)

    def by_layer(self, name: str, over: str = "tokens") -> dict[int, Trace]:
        """Return a quantity that steps (or evaluations: `eval.`) report layer by layer, such as `violation`."""
        rows = self.evaluations if name.startswith("eval.") else self.steps
        columns = {column: None for row in rows for column in row}
        names = (column.removeprefix(f"{name}.") for column in columns if column.startswith(f"{name}."))
        layers = sorted(int(layer) for layer in names if layer.isdecimal())
        return {layer: _trace(rows, over, f"{name}.{layer}") for layer in layers}

    def setting(self, path: str) -> Scalar:
        """Return the value of a leaf of the preset; None where there is no such leaf."""
        return next((setting.value for setting in self.settings if setting.path == path), None)


def _trace(rows: Sequence[Row], over: str, name: str) -> Trace:
    pairs = [(number(row.get(over)), number(row.get(name))) for row in rows]
    points = [(x, y) for x, y in pairs if x is not None and y is not None]
    return Trace(tuple(x for x, _ in points), tuple(y for _, y in points))


def number(value: object) -> float | None:
    """Return a finite number as it is, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def read_run(directory: str | Path, plugins: Sequence[str | Path] = ()) -> RunRecord:
    """Read a run directory, finished or not. Files that are missing or damaged leave gaps, not errors.

    Args:
        directory: The run directory.
        plugins: Plugin files to load; those that a run names are not loaded on its word.

    Raises:
        ForeignCodeError: The run needs plugin files that are not in `plugins`.
        ReportError: It is no run directory.
        ConfigError: Its experiment.yaml cannot be read.
    """
    run = read_files(directory)
    gaps = list(run.gaps)
    return evolve(run, measures=_measured(Path(directory) / "experiment.yaml", plugins, gaps), gaps=tuple(gaps))


def read_files(directory: str | Path) -> RunRecord:
    """Read a run directory as `read_run` does, but build no model and import no plugin.

    Raises:
        ReportError: It is no run directory.
        ConfigError: Its experiment.yaml cannot be read.
    """
    directory = Path(directory)
    preset = directory / "experiment.yaml"
    if not preset.is_file():
        raise ReportError(f"{directory} is no run directory: it has no experiment.yaml")
    gaps: list[str] = []
    files = {name: _object(directory / f"{name}.json", gaps) for name in ("about", "origins", "load", "verdict")}
    about, verdict = files["about"], files["verdict"]
    held_out = _map(about.get("held_out"))
    tree = load(preset)
    rows = _rows(directory / "metrics.jsonl", gaps)
    name = tree.child("name")
    return RunRecord(
        name=str(name.value) if name else directory.name,
        settings=tuple(_settings(tree, files["origins"])),
        steps=tuple(row for row in rows if not _is_evaluation(row)),
        evaluations=tuple(row for row in rows if _is_evaluation(row)),
        load=_load(files["load"]),
        averaged={name: _leaves(_map(row)) for name, row in _map(verdict.get("averaged")).items()},
        saving=_numbers(_map(verdict.get("saving"))),
        scores=read_scores(directory, gaps),
        grids=read_grids(directory, gaps),
        positions=read_positions(directory, gaps),
        pieces=tuple(_pieces(verdict.get("pieces"))),
        sample=str(verdict.get("sample", "")),
        speculation=_numbers(_map(verdict.get("speculation"))),
        command=tuple(map(str, _list(about.get("command")))),
        versions={key: str(value) for key, value in _map(about.get("versions")).items()},
        data=str(about.get("data", "")),
        start=str(_map(about.get("start")).get("checkpoint", "")),
        references=_numbers(_map(held_out.get("references"))),
        held_out_bytes=int(number(held_out.get("bytes")) or 0),
        gaps=tuple(gaps),
    )


def _is_evaluation(row: Row) -> bool:
    return any(name.startswith("eval.") for name in row)


def _object(path: Path, gaps: list[str]) -> Mapping[str, Plain]:
    """Return the map in a JSON file; an empty one where there is none, with a word in `gaps` if it is damaged."""
    if not path.is_file():
        return {}
    try:
        return _map(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        gaps.append(f"{path.name} is damaged: {error}")
        return {}


def _rows(path: Path, gaps: list[str]) -> list[Row]:
    """Return the lines of metrics.jsonl that can be read; a crash may have cut off the last."""
    if not path.is_file():
        gaps.append("there is no metrics.jsonl: the preset does not name the observer jsonl")
        return []
    rows: list[Row] = []
    bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        gaps.append(f"{bad} lines of metrics.jsonl cannot be read and are left out")
    return rows


def _map(value: Plain) -> Mapping[str, Plain]:
    return value if isinstance(value, dict) else {}


def _list(value: Plain) -> list[Plain]:
    return value if isinstance(value, list) else []


def _numbers(entries: Mapping[str, Plain]) -> dict[str, float]:
    return {name: known for name, value in entries.items() if (known := number(value)) is not None}


def _leaves(entries: Mapping[str, Plain]) -> Row:
    return {name: value for name, value in entries.items() if not isinstance(value, dict | list)}


def _load(entries: Mapping[str, Plain]) -> dict[int, tuple[int, ...]]:
    return {
        int(layer): tuple(int(number(count) or 0) for count in _list(counts))
        for layer, counts in entries.items()
        if layer.isdecimal()
    }


def _pieces(value: Plain) -> Iterator[Piece]:
    for entry in map(_map, _list(value)):
        alive = entry.get("alive")
        yield Piece(str(entry.get("name")), alive if isinstance(alive, bool) else None, str(entry.get("why")))


def _settings(tree: Node, origins: Mapping[str, Plain], path: str = "") -> Iterator[Setting]:
    """Yield the leaves of the preset in order."""
    if not isinstance(tree.value, dict | list):
        yield Setting(path, tree.value, str(origins.get(path, "")))
        return
    entries = tree.value.items() if isinstance(tree.value, dict) else enumerate(tree.value)
    for key, node in entries:
        yield from _settings(node, origins, f"{path}.{key}" if path else str(key))


def _measured(preset: Path, plugins: Sequence[str | Path], gaps: list[str]) -> "Measures | None":
    """Return the costs of the model. A preset may need a plugin, or a version of one, that is not here."""
    from tangram.core.context import BuildError
    from tangram.core.measure import measure
    from tangram.core.plugins import PluginError
    from tangram.core.presets import ForeignCodeError, load_preset
    from tangram.core.provenance import changed_files

    try:
        experiment = load_preset(preset, plugins=plugins)
        gaps += changed_files(preset.parent, experiment)
        return measure(experiment)
    except ForeignCodeError:
        raise
    except (BuildError, ConfigError, PluginError) as error:
        gaps.append(f"the model cannot be built here: {error}")
        return None

"""What a run scored on tasks and on hidden facts, kept in its directory for the report."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import cattrs
from attrs import asdict, frozen

from tangram.core.files import write_whole

FOLDER = "evaluations"
NEEDLE, POSITIONS = "needle", "positions"
"""What the grid of hidden facts and the losses by position are called; no task can be."""


@frozen
class Metric:
    """One number that a task gives.

    Attributes:
        name: Its name.
        value: What it is; None where it is no finite number.
        error: Its standard error; None where the task knows none.
    """

    name: str
    value: float | None
    error: float | None = None


@frozen
class TaskScore:
    """What a run scored on a task.

    Attributes:
        task: Name of the task.
        weights: Which weights: the last, or the averaged.
        step: Steps of which they are.
        items: Items of the task; 0 of a group of tasks.
        shots: Worked examples before each item.
        metrics: The numbers.
    """

    task: str
    weights: str
    step: int
    items: int
    shots: int
    metrics: tuple[Metric, ...]


@frozen
class NeedleGrid:
    """How often a run repeated a fact that was hidden in a text.

    Attributes:
        weights: Which weights: the last, or the averaged.
        step: Steps of which they are.
        text: Whether the text around is held out, or trained on where nothing is held out.
        trained: Tokens of the sequences that the run was trained on.
        needles: Facts tried for each place.
        lengths: Tokens of the contexts, the answer among them.
        depths: Where the fact stands: 0 at the beginning, 1 at the end.
        scores: Share of the facts that were repeated exactly, for each depth at each length.
    """

    weights: str
    step: int
    text: str
    trained: int
    needles: int
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]


@frozen
class PositionLosses:
    """How well a run predicts held-out text, by position in the sequence.

    Attributes:
        weights: Which weights: the last, or the averaged.
        step: Steps of which they are.
        trained: Tokens of the sequences that the run was trained on.
        stops: Where each range of positions ends; it begins where the one before ends.
        targets: Targets in each range.
        losses: Mean loss in each range, nats per token.
    """

    weights: str
    step: int
    trained: int
    stops: tuple[int, ...]
    targets: tuple[int, ...]
    losses: tuple[float, ...]


_T = TypeVar("_T")


def file_of(directory: Path, name: str, weights: str) -> Path:
    """Return where an evaluation of this name is kept; that of averaged weights stands beside that of the last."""
    plain = re.sub(r"[^\w.-]+", "_", name)
    return directory / FOLDER / f"{plain}{'' if weights == 'last' else f'.{weights}'}.json"


def write_score(directory: Path, score: TaskScore) -> Path:
    """Write a task's score in place of an earlier one; return its file."""
    return _write(file_of(directory, score.task, score.weights), score)


def write_grid(directory: Path, grid: NeedleGrid) -> Path:
    """Write a grid in place of an earlier one; return its file."""
    return _write(file_of(directory, NEEDLE, grid.weights), grid)


def write_positions(directory: Path, found: PositionLosses) -> Path:
    """Write losses by position in place of earlier ones; return their file."""
    return _write(file_of(directory, POSITIONS, found.weights), found)


def _write(path: Path, what: TaskScore | NeedleGrid | PositionLosses) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(asdict(what), indent=1) + "\n")
    return path


def read_scores(directory: Path, gaps: list[str]) -> tuple[TaskScore, ...]:
    """Return the scores of a run's tasks, by name; of a file that is damaged a word in `gaps`."""
    return _read([path for path in _files(directory) if _kind(path) not in (NEEDLE, POSITIONS)], TaskScore, gaps)


def read_grids(directory: Path, gaps: list[str]) -> tuple[NeedleGrid, ...]:
    """Return a run's grids; of a file that is damaged a word in `gaps`."""
    grids = _read([path for path in _files(directory) if _kind(path) == NEEDLE], NeedleGrid, gaps)
    if not all(map(_is_whole, grids)):
        gaps.append(f"{FOLDER}: a grid of hidden facts is not whole; evaluate again")
    return tuple(filter(_is_whole, grids))


def read_positions(directory: Path, gaps: list[str]) -> tuple[PositionLosses, ...]:
    """Return a run's losses by position; of a file that is damaged a word in `gaps`."""
    found = _read([path for path in _files(directory) if _kind(path) == POSITIONS], PositionLosses, gaps)
    whole = tuple(each for each in found if 0 < len(each.stops) == len(each.targets) == len(each.losses))
    if len(whole) < len(found):
        gaps.append(f"{FOLDER}: losses by position are not whole; evaluate again")
    return whole


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / FOLDER).glob("*.json") if not path.name.startswith("."))


def _kind(path: Path) -> str:
    return path.name.partition(".")[0]


def _is_whole(grid: NeedleGrid) -> bool:
    shape = [len(row) for row in grid.scores]
    return bool(grid.lengths and grid.depths) and shape == [len(grid.lengths)] * len(grid.depths)


def _read(paths: Sequence[Path], kind: type[_T], gaps: list[str]) -> tuple[_T, ...]:
    found = []
    for path in paths:
        try:
            found.append(cattrs.structure(json.loads(path.read_text(encoding="utf-8")), kind))
        except (ValueError, OSError, cattrs.BaseValidationError):
            gaps.append(f"{FOLDER}/{path.name} is damaged; evaluate again")
    return tuple(found)

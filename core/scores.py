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
NEEDLE = "needle"
"""What the grid of hidden facts is called; no task can be."""


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


def _write(path: Path, what: TaskScore | NeedleGrid) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(asdict(what), indent=1) + "\n")
    return path


def read_scores(directory: Path, gaps: list[str]) -> tuple[TaskScore, ...]:
    """Return the scores of a run's tasks, by name; of a file that is damaged a word in `gaps`."""
    return _read([path for path in _files(directory) if not _is_grid(path)], TaskScore, gaps)


def read_grids(directory: Path, gaps: list[str]) -> tuple[NeedleGrid, ...]:
    """Return a run's grids; of a file that is damaged a word in `gaps`."""
    grids = _read([path for path in _files(directory) if _is_grid(path)], NeedleGrid, gaps)
    if not all(map(_is_whole, grids)):
        gaps.append(f"{FOLDER}: a grid of hidden facts is not whole; evaluate again")
    return tuple(filter(_is_whole, grids))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / FOLDER).glob("*.json") if not path.name.startswith("."))


def _is_grid(path: Path) -> bool:
    return path.name.partition(".")[0] == NEEDLE


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

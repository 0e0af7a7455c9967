"""What a study's directory says: the plan that was written when it began, and the runs of its cells."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from tangram.core.cells import Cell, read_cell
from tangram.core.config import Scalar
from tangram.core.reports import ReportError, RunRecord, number, read_files
from tangram.core.statistics import Finding, Paired, finding, holm, noise, paired

PLAN = "study.json"
"""What makes a directory one of a study."""


@frozen(eq=False)
class VariantPlan:
    """What was planned for a variant.

    Attributes:
        name: Its name.
        difference: Leaves in which it differs from the base: there, and here.
        parameters: Parameters of the main model.
        active: Those that one token passes through.
        tokens: Tokens of training.
        flops: Operations of the training.
        residual: What is left of the difference in what is matched; None where nothing was known before training.
        cells: Ids of its cells by seed.
    """

    name: str
    difference: Mapping[str, tuple[Scalar, Scalar]]
    parameters: int
    active: int
    tokens: int
    flops: int
    residual: float | None
    cells: Mapping[int, str]


@frozen(eq=False)
class StudyPlan:
    """What was planned.

    Attributes:
        name: Name of the study.
        base: The base preset.
        seeds: The seeds.
        match: What is matched.
        statement: What was made equal, and how.
        metrics: `lower` or `higher` by metric.
        command: The command line, word by word.
        versions: What the numbers depend on.
        variants: The base and its variants.
    """

    name: str
    base: str
    seeds: tuple[int, ...]
    match: str
    statement: str
    metrics: Mapping[str, str]
    command: tuple[str, ...]
    versions: Mapping[str, str]
    variants: tuple[VariantPlan, ...]


@frozen(eq=False)
class CellRecord:
    """A cell and its run.

    Attributes:
        cell: What became of it.
        run: Its run; None where it has not begun.
        memory: Largest resident memory, bytes; None where the run has not ended.
    """

    cell: Cell
    run: RunRecord | None
    memory: float | None

    @property
    def seconds(self) -> float | None:
        """Seconds of all steps."""
        return number(self.run.steps[-1].get("seconds")) if self.run and self.run.steps else None

    def value(self, metric: str) -> float | None:
        """Return a metric of a cell that is done; None where it has none.

        `eval.NAME` is the evaluation on all held-out text, anything else the mean over the last tenth of the steps.
        """
        if self.run is None or self.cell.state != "done":
            return None
        if metric.startswith("eval."):
            complete = [row for row in self.run.evaluations if row.get("eval.complete")]
            return number(complete[-1].get(metric)) if complete else None
        values = [number(row.get(metric)) for row in self.run.steps]
        last = values[-max(1, len(values) // 10) :]
        known = [value for value in last if value is not None]
        return sum(known) / len(known) if known and len(known) == len(last) else None


@frozen(eq=False)
class Comparison:
    """A variant beside the base in one metric.

    Attributes:
        variant: Its name.
        values: The metric of the variant by seed.
        difference: The paired difference; None where there is no pair, and for the base.
        p: Its p value, corrected for the number of variants.
        finding: The verdict.
    """

    variant: str
    values: Mapping[int, float]
    difference: Paired | None
    p: float | None
    finding: Finding


@frozen(eq=False)
class StudyRecord:
    """A study as its directory tells it.

    Attributes:
        plan: What was planned.
        cells: What became of each cell, by variant and seed.
    """

    plan: StudyPlan
    cells: Mapping[str, Mapping[int, CellRecord]] = field(factory=dict)

    @property
    def bad(self) -> list[CellRecord]:
        """Cells that are not done."""
        return [cell for row in self.cells.values() for cell in row.values() if cell.cell.state != "done"]

    def values(self, variant: str, metric: str) -> dict[int, float]:
        """Return a metric by seed, of the cells that have it."""
        found = {seed: cell.value(metric) for seed, cell in self.cells[variant].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def noise(self, metric: str) -> float:
        """Return how far two runs of the base usually are apart."""
        return noise(list(self.values(self.plan.variants[0].name, metric).values()))

    def compare(self, metric: str) -> list[Comparison]:
        """Compare every variant with the base; the base stands first."""
        base, *others = (variant.name for variant in self.plan.variants)
        known = self.values(base, metric)
        found: dict[str, Paired | None] = {}
        for name in others:
            values = self.values(name, metric)
            seeds = [seed for seed in known if seed in values]
            found[name] = paired([known[seed] for seed in seeds], [values[seed] for seed in seeds])
        corrected = holm({name: pair.p for name, pair in found.items() if pair is not None and pair.p is not None})
        lower, floor = self.plan.metrics[metric] == "lower", self.noise(metric)
        rows = [Comparison(base, known, None, None, Finding.NONE)]
        for name, pair in found.items():
            p = corrected.get(name)
            word = finding(pair, p, floor, lower_is_better=lower)
            rows.append(Comparison(name, self.values(name, metric), pair, p, word))
        return rows


def read_study_record(directory: str | Path) -> StudyRecord:
    """Read the directory of a study, finished or not.

    Raises:
        ReportError: It is none, or its plan is damaged.
    """
    directory = Path(directory)
    try:
        plan = _plan(json.loads((directory / PLAN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ReportError(f"{directory} is no study: it has no {PLAN}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{directory / PLAN} is damaged: {error}") from None
    cells = {
        variant.name: {seed: _cell(directory, variant.name, seed, id_) for seed, id_ in variant.cells.items()}
        for variant in plan.variants
    }
    return StudyRecord(plan, cells)


def _plan(content: dict[str, Any]) -> StudyPlan:
    variants = []
    for entry in content["variants"]:
        difference = {path: (there, here) for path, (there, here) in entry["difference"].items()}
        cells = {int(seed): str(id_) for seed, id_ in entry["cells"].items()}
        variants.append(VariantPlan(**entry | {"difference": difference, "cells": cells}))
    lists = {key: tuple(content[key]) for key in ("seeds", "command")}
    return StudyPlan(**content | lists | {"variants": tuple(variants)})


def _cell(study: Path, variant: str, seed: int, id_: str) -> CellRecord:
    directory = study / "cells" / id_
    cell = read_cell(directory) or Cell(id_, variant, seed)
    run = read_files(directory) if (directory / "metrics.jsonl").is_file() else None
    try:
        verdict = json.loads((directory / "verdict.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        verdict = {}
    return CellRecord(cell, run, number(verdict.get("peak_rss")))

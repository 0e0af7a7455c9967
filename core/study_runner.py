"""A study under way: its plan is written, and every cell that is not done is given to the launcher."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path

import attrs
from attrs import evolve

from tangram.core.cells import Cell, cells_of, read_cell, used_versions, write_cell
from tangram.core.contracts import Job, Launcher
from tangram.core.files import write_whole
from tangram.core.matching import Matched
from tangram.core.process import versions
from tangram.core.study_record import PLAN, StudyPlan, VariantPlan
from tangram.core.terminal import STOPPED


def prepare(matched: Matched, out: Path) -> list[Cell]:
    """Write the plan of a study and the directories of its cells; return the cells as they stand.

    Raises:
        ConfigError: The data of a cell cannot be read.
        PluginError: A plugin has no source.
    """
    cells = cells_of(matched.study, out / "cells")
    write_whole(out / "study.yaml", matched.study.file.read_text(encoding="utf-8"))
    write_whole(out / PLAN, json.dumps(attrs.asdict(_plan(matched, cells)), indent=1))
    return cells


def _plan(matched: Matched, cells: list[Cell]) -> StudyPlan:
    study = matched.study
    differences = study.differences()
    used = {"python": versions()["python"], "machine": versions()["machine"], "scipy": metadata.version("scipy")}
    variants = []
    for variant in study.variants:
        budget = matched.budgets[variant.name]
        used |= used_versions(variant.experiment, study.plugins.registry)
        variants.append(
            VariantPlan(
                name=variant.name,
                difference=differences.get(variant.name, {}),
                parameters=budget.parameters,
                active=budget.measures.parameters.active,
                tokens=budget.tokens,
                flops=budget.flops,
                residual=matched.residuals.get(variant.name),
                cells={cell.seed: cell.id for cell in cells if cell.variant == variant.name},
            )
        )
    return StudyPlan(
        name=study.asked.name,
        base=study.asked.base,
        seeds=study.asked.seeds,
        match=study.asked.match.on,
        statement=matched.statement,
        metrics=study.asked.metrics,
        command=("tangram", *sys.argv[1:]),
        versions=used,
        variants=tuple(variants),
    )


def run_cells(matched: Matched, cells: list[Cell], out: Path, launcher: Launcher) -> Iterator[Cell]:
    """Run the cells that are not done and have not diverged, and yield each as it ends."""
    left = {cell.id: cell for cell in cells if cell.state not in ("done", "diverged")}
    plugins = [str(file) for file in matched.study.plugins.files]
    jobs = [
        Job(id_, _command((out / "cells" / id_).resolve(), plugins, matched.study.asked.keep_checkpoints))
        for id_ in left
    ]
    with closing(launcher.run(jobs, out / "logs")) as ended:
        for job, code in ended:
            yield _told(out, left[job.name], code)


def _command(cell: Path, plugins: list[str], keep: bool) -> tuple[str, ...]:
    line = [sys.executable, "-m", "tangram.core.cell_worker", str(cell)]
    for file in plugins:
        line += ["--plugin", file]
    return (*line, *(["--keep-checkpoints"] if keep else []))


def _told(out: Path, cell: Cell, code: int) -> Cell:
    """Return what the worker wrote of its cell, or write what it could not: that it was killed."""
    directory = out / "cells" / cell.id
    found = read_cell(directory) or cell
    if found.state in ("pending", "running") and code not in (0, STOPPED):
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        found = evolve(found, state="failed", why=f"{how}; see {out / 'logs' / cell.id}.log")
        write_cell(directory, found)
    return found

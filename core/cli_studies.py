"""The command `ablate`; torch is imported inside it."""

import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tangram.core.parameters import Files, Json
from tangram.core.terminal import FAILED, OK, STOPPED, as_json, say, table

if TYPE_CHECKING:
    from tangram.core.cells import Cell
    from tangram.core.contracts import Launcher
    from tangram.core.matching import Matched
    from tangram.core.pace import Paces


def ablate(
    study: Path, /, *, out: Path | None = None, dry_run: bool = False, json_: Json = False, plugin: Files = ()
) -> int:
    """Run an ablation study: train every variant from every seed, and say what each difference did.

    Args:
        study: The study file.
        out: The directory of the study; by default studies/<name>. What is done there is not done again.
        dry_run: Say what would be trained, what it costs and about how long it takes, and train nothing.
    """
    from tangram.core.matching import matched
    from tangram.core.pace import Paces
    from tangram.core.plugins import Plugins
    from tangram.core.study import read_study

    asked = read_study(study, Plugins.discover(plugin))
    launcher = asked.asked.launcher.build()
    directory = out or Path("studies", asked.asked.name)
    paces = Paces(None if dry_run else directory / "paces.json", launcher.threads)
    ready = matched(asked, lambda variant: paces.of(variant.experiment))
    if not json_:
        _print_differences(ready)
    if dry_run:
        return _foretell(ready, paces, launcher, json_)
    return _run(ready, directory, launcher, json_)


def _print_differences(ready: "Matched") -> None:
    for name, changes in ready.study.differences().items():
        rows = [(path, json.dumps(there), json.dumps(here)) for path, (there, here) in changes.items()]
        table(("path", "base", name), rows)
        say("")
    say(ready.statement)


def _foretell(ready: "Matched", paces: "Paces", launcher: "Launcher", json_: bool) -> int:
    """Print what a study would cost."""
    seeds = len(ready.study.asked.seeds)
    rows: list[dict[str, object]] = []
    total: float | None = 0.0
    for variant in ready.study.variants:
        budget = ready.budgets[variant.name]
        pace = variant.building(partial(paces.of, variant.experiment))
        seconds = None if pace is None else pace.seconds(budget.tokens)
        total = None if total is None or seconds is None else total + seconds * seeds
        rows.append(
            {
                "variant": variant.name,
                "cells": seeds,
                "parameters": budget.parameters,
                "active": budget.measures.parameters.active,
                "flops": budget.flops,
                "tokens": budget.tokens,
                "residual": ready.residuals.get(variant.name),
                "seconds": seconds,
            }
        )
    whole = None if total is None else total / launcher.workers
    if json_:
        return as_json(
            {"name": ready.study.asked.name, "statement": ready.statement, "variants": rows, "seconds": whole}
        )
    header = ("variant", "cells", "parameters", "active", "FLOP a cell", "tokens a cell", "residual", "seconds a cell")
    table(header, [tuple(_cell(name, value) for name, value in row.items()) for row in rows])
    if whole is None:
        say("time: not tried, for the model needs more than half of this machine's memory")
    else:
        say(
            f"about {whole / 60:.1f} minutes with {launcher.workers} cells at once, from a trial of a few steps of "
            f"each variant alone, on this machine with {launcher.threads} threads"
        )
    return OK


def _cell(name: str, value: object) -> str:
    if value is None:
        return "not tried" if name == "seconds" else ""
    if isinstance(value, float):
        return f"{value:+.2%}" if name == "residual" else f"{value:,.0f}"
    return f"{value:.3e}" if name == "flops" else f"{value:,}" if isinstance(value, int) else str(value)


def _run(ready: "Matched", directory: Path, launcher: "Launcher", json_: bool) -> int:
    """Train what is not done, and report."""
    from tangram.core.study_record import read_study_record
    from tangram.core.study_report import results, write_study_report
    from tangram.core.study_runner import prepare, run_cells
    from tangram.core.study_tables import tables

    cells = prepare(ready, directory)
    there = {cell.id: cell for cell in cells}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _tell(f"{sum(cell.state == 'done' for cell in cells)} of {len(cells)} cells are done already")
        for ended in run_cells(ready, cells, directory, launcher):
            there[ended.id] = ended
            _tell(f"{_counted(there)}: {ended.variant}, seed {ended.seed}: {ended.state}{_because(ended)}")
    except KeyboardInterrupt:
        _tell(f"stopped: {_counted(there)}; the same command goes on from there")
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    path = write_study_report(directory)
    record = read_study_record(directory)
    if json_:
        as_json(results(record))
    else:
        for shown in tables(record)[: len(record.plan.metrics) + 1]:
            say(f"\n{shown.title}")
            table(shown.header, shown.rows)
        say(f"the report is {path}")
    return FAILED if record.bad else OK


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _counted(cells: "dict[str, Cell]") -> str:
    return f"{sum(cell.state == 'done' for cell in cells.values())}/{len(cells)} done"


def _because(cell: "Cell") -> str:
    return f" ({cell.why})" if cell.why else ""

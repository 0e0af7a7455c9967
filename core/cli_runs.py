"""The commands `evaluate` and `report`, which read a run; torch is imported inside them."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tangram.core.parameters import Files, Json
from tangram.core.terminal import OK, as_json, print_bits, refuse, say


def evaluate(
    run: Path,
    /,
    *,
    tasks: tuple[str, ...] = (),
    needle: bool = False,
    needle_lengths: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (),
    positions: int | None = None,
    ema: bool = False,
    json_: Json = False,
    plugin: Files = (),
) -> int:
    """Evaluate a run's newest checkpoint on all held-out text; or on tasks or a needle, or by position.

    The first leaves the run as it is; the others write what they find into its folder evaluations, where its report
    finds it.

    Args:
        run: The run directory.
        tasks: A task of lm-evaluation-harness: its file, a folder of such files, or its name; may be repeated.
        needle: Hide facts in long texts, at several lengths and depths, and ask for them.
        needle_lengths: Tokens of those texts; by default up to what the run was trained on.
        positions: The loss of held-out text by position, in sequences of so many tokens.
        ema: Take the averaged weights that the observer ema kept.
    """
    if tasks or needle or needle_lengths or positions is not None:
        # By its name: such evaluation stands above the core.
        command = import_module("tangram.plugins.evaluation.command")
        lengths = needle_lengths if needle or needle_lengths else None
        return int(command.evaluate(run, tasks, lengths, positions, ema, json_, plugin))
    from tangram.core.evaluation import evaluate as evaluated
    from tangram.core.run import load_run

    trainer = load_run(run, averaged=ema, plugins=plugin)
    report, held_out = evaluated(trainer), trainer.data.held_out
    if report is None or held_out is None:
        return refuse(f"{run} was trained on data without held-out text")
    weights = "averaged" if ema else "last"
    if json_:
        return as_json(report.metrics() | {"weights": weights, "references": dict(held_out.references)})
    say(f"step {report.now.step}, {weights} weights")
    print_bits(report, held_out.references)
    for name, loss in report.losses.items():
        say(f"loss.{name}: {loss:.4f}")
    return OK


def report(run: Path, /, *, json_: Json = False, plugin: Files = ()) -> int:
    """Write the report of a run or of a study, finished or not, into its directory as report.html.

    Args:
        run: The run's or the study's directory.
    """
    from tangram.core.pages import summary, write_report
    from tangram.core.reports import ReportError, read_run
    from tangram.core.study_record import PLAN

    if (run / PLAN).is_file():
        return _report_study(run, json_)
    try:
        path = write_report(run, plugin)
    except ReportError as error:
        return refuse(str(error))
    if json_:
        return as_json({"report": str(path)} | summary(read_run(run, plugin)))
    say(str(path))
    return OK


def _report_study(directory: Path, json_: bool) -> int:
    from tangram.core.reports import ReportError
    from tangram.core.study_record import read_study_record
    from tangram.core.study_report import results, write_study_report

    try:
        path = write_study_report(directory)
    except ReportError as error:
        return refuse(str(error))
    if json_:
        return as_json({"report": str(path)} | results(read_study_record(directory)))
    say(str(path))
    return OK

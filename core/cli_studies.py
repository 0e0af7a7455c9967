"""The command `ablate`; torch is imported inside it."""

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tangram.core.parameters import Files, Json
from tangram.core.terminal import OK, STOPPED, say, table

if TYPE_CHECKING:
    from tangram.core.matching import Matched


def ablate(
    study: Path,
    /,
    *,
    out: Path | None = None,
    dry_run: bool = False,
    json_: Json = False,
    plugin: Files = (),
) -> int:
    """Run an ablation study: train every variant from every seed, and say what each difference did.

    Args:
        study: The study file.
        out: The directory of the study; by default studies/<name>. What is done there is not done again.
        dry_run: Say what would be trained, what it costs and about how long it takes, and train nothing.
    """
    from tangram.core.matching import matched
    from tangram.core.plugins import Plugins
    from tangram.core.study import read_study
    from tangram.core.study_report import write_study_report
    from tangram.core.study_runner import prepare, run_cells

    asked = read_study(study, Plugins.discover(plugin))
    launcher = asked.asked.launcher.build()
    ready = matched(asked, lambda variant: 1.0)
    directory = out or Path("studies") / asked.asked.name
    if not json_:
        _print_differences(ready)
    if dry_run:
        return OK
    cells = prepare(ready, directory)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for cell in run_cells(ready, cells, directory, launcher):
            print(f"{cell.variant}, seed {cell.seed}: {cell.state} {cell.why}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from where {directory} stands", file=sys.stderr)
        return STOPPED
    path = write_study_report(directory)
    say(path.read_text())
    return OK


def _print_differences(ready: "Matched") -> None:
    for name, changes in ready.study.differences().items():
        say(f"{name}: differs from the base in")
        table(("path", "base", name), [(path, json.dumps(a), json.dumps(b)) for path, (a, b) in changes.items()])

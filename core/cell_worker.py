"""The process that trains one cell: `python -m tangram.core.cell_worker CELL [--plugin FILE]...`."""

import shutil
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve

from tangram.core.process import settle
from tangram.core.terminal import FAILED, OK, STOPPED, fail


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the cell, from its last checkpoint if it has one; return an exit code of `tangram train`."""
    parser = ArgumentParser()
    parser.add_argument("cell", type=Path)
    parser.add_argument("--plugin", type=Path, action="append", default=[])
    parser.add_argument("--keep-checkpoints", action="store_true")
    asked = parser.parse_args(arguments)
    settle()
    from tangram.core.cells import held, read_cell

    with held(asked.cell):
        cell = read_cell(asked.cell)
        if cell is None:
            return fail(f"{asked.cell} is no cell: it has no cell.json")
        if cell.state in ("done", "diverged"):
            return OK if cell.state == "done" else FAILED
        code = _trained(asked.cell, asked.plugin)
        if code == OK and not asked.keep_checkpoints:
            shutil.rmtree(asked.cell / "checkpoints", ignore_errors=True)
        return code


def _trained(directory: Path, plugins: Sequence[Path]) -> int:
    """Train under the lock, and write down what became of the cell."""
    from tangram.core.cells import State, read_cell, write_cell
    from tangram.core.contracts import NonFiniteError
    from tangram.core.interruption import RunInterruptedError
    from tangram.core.plugins import Plugins
    from tangram.core.presets import resolve
    from tangram.core.provenance import RUN_PRESET
    from tangram.core.run import train

    def note(state: State, why: str = "") -> None:
        cell = read_cell(directory)
        assert cell is not None
        write_cell(directory, evolve(cell, state=state, why=why))

    note("running")
    try:
        resolved = resolve(directory / RUN_PRESET, (), Plugins.discover(plugins))
        train(resolved.experiment, directory, resume=True)
    except RunInterruptedError as error:
        print(error, file=sys.stderr)
        return STOPPED
    except NonFiniteError as error:
        note("diverged", f"stopped before the update of {error}")
        return FAILED
    except Exception as error:
        traceback.print_exc()
        note("failed", f"{type(error).__name__}: {error}")
        return FAILED
    note("done")
    return OK


if __name__ == "__main__":
    sys.exit(main())

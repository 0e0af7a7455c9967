"""Commands as processes of their own, without paying for the imports of torch each time."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_PARENT = """
import json, os, signal, sys
from tangram.core import cli, measure, presets, run  # once, and not in every child
for name, arguments in json.load(sys.stdin).items():
    if (child := os.fork()) == 0:
        said = os.open(name + ".said", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        signal.alarm(240)
        cli.main(arguments)
    print(json.dumps([name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]), flush=True)
"""


def answers(
    commands: Mapping[str, Sequence[str]], folder: Path, environment: Mapping[str, str]
) -> dict[str, tuple[int, str]]:
    """Run commands in `folder`, one after the other; return the exit code of each and all that it printed.

    A command that takes more than four minutes is ended by a signal, and its exit code is negative.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PARENT],
        input=json.dumps({name: list(arguments) for name, arguments in commands.items()}),
        cwd=folder,
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    codes = dict(json.loads(line) for line in done.stdout.splitlines())
    assert codes.keys() == commands.keys(), done.stderr
    return {
        name: (code, (folder / f"{name}.said").read_text(encoding="utf-8", errors="replace"))
        for name, code in codes.items()
    }

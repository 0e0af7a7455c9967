"""What a command prints to a person or a program, and the exit codes that go with it."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence

OK, FAILED, USAGE, BROKEN, STOPPED = 0, 1, 2, 3, 75
"""Exit codes: all went well; the run failed; usage or config; a plugin that is named does not load; interrupted."""


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        drawn.add_row(*row)
    Console(highlight=False, markup=False).print(drawn)


def as_json(value: Mapping[str, object]) -> int:
    """Print a value as JSON; return the exit code of success."""
    print(json.dumps(value, indent=1))
    return OK


def refuse(message: str) -> int:
    """Tell a user's mistake; return its exit code."""
    print(message, file=sys.stderr)
    return USAGE


def fail(message: str) -> int:
    """Tell a failure; return its exit code."""
    print(message, file=sys.stderr)
    return FAILED


def words(value: object) -> str:
    """Return a finding as text: a list has a line for each entry."""
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "none"
    return str(value)

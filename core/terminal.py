"""What a command prints to a person or a program, and the exit codes that go with it."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tangram.core.records import EvalReport
    from tangram.core.session import Outcome

OK, FAILED, USAGE, BROKEN, STOPPED, KILLED = 0, 1, 2, 3, 75, 130
"""Exit codes: all went well; the run failed; usage or config; a plugin that is named does not load; a run stopped and
saved on request; Ctrl-C with nothing saved."""

_WORD = 17
"""Letters of a word that a table does not break: those of `arXiv:2412.19437,`."""

_WIDE = 1000
"""Letters of the longest line that a table has where there is no terminal."""


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: as wide as the terminal, and elsewhere with a line for each row, for `grep`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    cells = list(rows)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, *column in zip(header, *cells, strict=True):
        longest = max(len(word) for cell in (name, *column) for word in cell.split() or [""])
        drawn.add_column(name, overflow="fold", min_width=min(longest, _WORD))
    for row in cells:
        drawn.add_row(*row)
    if not console.is_terminal:
        console.width = max(console.width, console.measure(drawn, options=console.options.update(width=_WIDE)).maximum)
    console.print(drawn)


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


def print_outcome(outcome: "Outcome") -> None:
    """Print how a run ended."""
    if outcome.evaluation is not None:
        print_bits(outcome.evaluation, outcome.references)
        for name, report in outcome.averaged.items():
            if report.bits_per_byte is not None:
                say(f"with the weights averaged by {name}: {report.bits_per_byte:.3f} bits per byte")
    if outcome.sample:
        say(f"sample:\n{outcome.sample}")
    if outcome.speculation:
        kept = ", ".join(f"{share:.0%} at {name}" for name, share in outcome.speculation.items() if "depth" in name)
        say(f"drafts kept: {kept}; {outcome.speculation['tokens a round']:.2f} tokens a round")
    for piece in outcome.pieces:
        word = {True: "alive", False: "dead", None: "too short to tell"}[piece.alive]
        say(f"{piece.name}: {word} ({piece.why})")
    saving = outcome.saving
    plural = "" if saving.checkpoints == 1 else "s"
    say(
        f"{saving.checkpoints} checkpoint{plural} held training up for {saving.held_up:.1f} s ({saving.share:.1%}), "
        f"written beside it in {saving.writing:.1f} s"
    )
    say(f"peak memory {outcome.peak_rss / 2**30:.2f} GiB; everything is in {outcome.directory}")


def print_bits(report: "EvalReport", references: Mapping[str, float]) -> None:
    """Print what an evaluation found, beside general compressors."""
    if report.bits_per_byte is not None:
        others = ", ".join(f"{name} {bits:.3f}" for name, bits in references.items())
        ours = f"{report.bits_per_byte:.3f} bits per byte"
        say(f"held-out text ({report.n_bytes:,} bytes): {ours}; the same text by {others}")

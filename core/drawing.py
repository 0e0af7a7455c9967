"""What all pictures share: axes to draw on, colours, and SVG text, the same bytes for the same data.

Colours are those of Okabe and Ito, which the colour-blind tell apart.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tangram.core.reports import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
POINTS = 1000
"""Most points of a line: more cannot be told apart."""


def thinned(trace: Trace, limit: int = POINTS) -> Trace:
    """Return at most `limit` points of a trace: of each stretch the lowest and the highest, so that no peak is lost."""
    n = len(trace.y)
    if n <= limit:
        return trace
    stretches = (limit - 2) // 2
    kept = {0, n - 1}
    for i in range(stretches):
        inside = range(i * n // stretches, (i + 1) * n // stretches)
        kept |= {min(inside, key=trace.y.__getitem__), max(inside, key=trace.y.__getitem__)}
    order = sorted(kept)
    return Trace(tuple(trace.x[i] for i in order), tuple(trace.y[i] for i in order))


@contextmanager
def drawing(key: str, width: float = 4.8, height: float = 3.0) -> "Iterator[tuple[Axes, list[str]]]":
    """Give axes to draw on; when it ends, the list holds the SVG, its ids prefixed by `key`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn: list[str] = []
    style = rc_context(
        {
            "svg.hashsalt": key,
            "svg.fonttype": "none",  # letters stay letters: they can be searched, and the file is small
            "text.parse_math": False,  # a name with a dollar sign is a name
            "font.size": 10.0,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.3,
        }
    )
    with style:
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.add_subplot(), drawn
        drawn.append(_svg(figure, key))


def _svg(figure: "Figure", key: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Several pictures share a page, where an id may stand only once.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", text).rstrip()


def plain_thousands(axes: "Axes") -> None:
    """Write 400000 as 400 k on the axis below, for labels that do not run into each other."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5))

"""A plan over time, as letters for a terminal and as a picture."""

from collections.abc import Iterator, Sequence

from tangram.core.drawing import COLOURS, drawing
from tangram.core.plan import Action, Op, Plan
from tangram.core.simulator import Span, Timeline

_LETTERS = {
    Op.FORWARD: "F",
    Op.BACKWARD: "B",
    Op.INPUT_BACKWARD: "I",
    Op.WEIGHT_BACKWARD: "W",
    Op.OVERLAP: "X",
}
_KINDS = {
    Op.FORWARD: ("forward", COLOURS[0]),
    Op.BACKWARD: ("backward", COLOURS[2]),
    Op.INPUT_BACKWARD: ("input gradient", COLOURS[5]),
    Op.WEIGHT_BACKWARD: ("weight gradient", COLOURS[4]),
    Op.OVERLAP: ("overlapped", COLOURS[3]),
}
_NUMBERED = 40
"""Most spans of a rank whose micro-batches are written into the picture."""

LEGEND = "F forward, B backward, I input gradient, W weight gradient, X forward and backward overlapped, . nothing"


def lines(timeline: Timeline, width: int) -> Iterator[str]:
    """Yield a line for each rank: at each of `width` equal steps of time, the letter of what it does.

    Where micro-batches are worth two columns or more, the number stands behind the letter; flow 1 has small letters.
    """
    total = timeline.makespan or 1.0
    for rank, spans in enumerate(timeline.spans):
        row = ["."] * width
        for span in spans:
            first, last = round(span.start / total * width), round(span.end / total * width)
            text = _mark(span.action)
            for column in range(first, min(last, width)):
                inside = column - first
                row[column] = text[inside] if inside < len(text) and last - first > len(text) else text[0]
        yield f"{rank:>3} {''.join(row)}"


def _mark(action: Action) -> str:
    letter = _LETTERS[action.op]
    number = f"{action.slot.microbatch}" if action.other is None else ""
    return (letter.lower() if action.slot.flow else letter) + number


def picture(plan: Plan, timeline: Timeline, title: str) -> str:
    """Return the Gantt chart of all ranks as SVG."""
    with drawing("schedule", width=11.0, height=1.3 + 0.36 * plan.ranks) as (axes, drawn):
        for rank, spans in enumerate(timeline.spans):
            for op, (_, colour) in _KINDS.items():
                chosen = [span for span in spans if span.action.op is op]
                bars = [(span.start, span.end - span.start) for span in chosen]
                axes.broken_barh(bars, (rank - 0.42, 0.84), facecolors=colour, edgecolors="white", linewidth=0.5)
            if len(spans) <= _NUMBERED:
                _number(axes, rank, spans)
        used = {span.action.op for spans in timeline.spans for span in spans}
        for op, (name, colour) in _KINDS.items():
            if op in used:
                axes.plot([], [], color=colour, linewidth=6, label=name)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False)
        axes.set_yticks(range(plan.ranks))
        axes.set_ylim(plan.ranks - 0.5, -0.5)
        axes.set_xlim(0, timeline.makespan)
        axes.set_xlabel(title)
        axes.set_ylabel("rank")
        axes.grid(visible=False)
    return drawn[0]


def _number(axes: object, rank: int, spans: Sequence[Span]) -> None:
    """Write the micro-batch into each bar; of flow 1 in italics, of an overlap both."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    for span in spans:
        parts = span.action.parts
        text = " ".join(str(part.slot.microbatch) for part in parts)
        style = "italic" if parts[0].slot.flow else "normal"
        middle = (span.start + span.end) / 2
        axes.text(middle, rank, text, ha="center", va="center", color="white", fontsize=7, fontstyle=style)

"""The pictures of a study: curves of every run, and the differences with their intervals."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from tangram.core.drawing import COLOURS, DASHES, drawing, plain_thousands
from tangram.core.reports import RunRecord, Trace, number
from tangram.core.statistics import Finding
from tangram.core.study_record import StudyRecord, VariantPlan

AXES = {"tokens": "tokens", "flops": "training FLOP, main model", "seconds": "seconds"}
"""What curves are drawn over, and how the axis is called."""

STRETCHES = 80
"""Points of a curve of steps: each the mean of a stretch of them, for single steps are noise."""

_LOOK = {
    Finding.BETTER: COLOURS[2],
    Finding.WORSE: COLOURS[1],
    Finding.WITHIN_NOISE: COLOURS[0],
    Finding.INCONCLUSIVE: "#777777",
    Finding.NONE: "#bbbbbb",
}


def curves(record: StudyRecord, column: str, over: str) -> str | None:
    """Draw a column of metrics.jsonl for every run: thin a seed, thick the mean of a variant's seeds."""
    lines = {plan.name: list(_lines(record, plan, column, over)) for plan in record.plan.variants}
    if not any(lines.values()):
        return None
    with drawing(f"{column}-{over}", height=3.4) as (axes, drawn):
        handles, names = [], []
        for i, (name, traces) in enumerate(lines.items()):
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
            for trace in traces:
                axes.plot(trace.x, trace.y, color=colour, linewidth=0.6, alpha=0.4)
            mean = _mean(traces)
            if mean.x:
                mark = "o" if len(mean.x) < 3 else ""
                handles += axes.plot(mean.x, mean.y, color=colour, linestyle=dash, marker=mark, markersize=3)
                names.append(name)
        axes.set_xlabel(AXES[over])
        axes.set_ylabel(column)
        plain_thousands(axes)
        axes.legend(handles, names, fontsize=9, framealpha=0.8, edgecolor="none")
    return drawn[0]


def _lines(record: StudyRecord, plan: VariantPlan, column: str, over: str) -> Iterator[Trace]:
    """Yield the trace of each seed that has one."""
    for cell in record.cells[plan.name].values():
        if cell.run is None:
            continue
        evaluated = column.startswith("eval.")
        # An evaluation does not say its seconds; the step before it does.
        trace = cell.run.evaluated(column, "step") if evaluated else stretched(cell.run.trace(column, "step"))
        places = _places(cell.run, over, plan.flops / plan.tokens)
        points = [(places[round(x)], y) for x, y in zip(trace.x, trace.y, strict=True) if round(x) in places]
        if points:
            yield Trace(tuple(x for x, _ in points), tuple(y for _, y in points))


def _places(run: RunRecord, over: str, flops_per_token: float) -> dict[int, float]:
    """Return where on the axis each step ends, and the run begins."""
    column = "seconds" if over == "seconds" else "tokens"
    scale = flops_per_token if over == "flops" else 1.0
    known = [(number(row.get("step")), number(row.get(column))) for row in run.steps]
    return {0: 0.0} | {round(step): scale * value for step, value in known if step is not None and value is not None}


def stretched(trace: Trace, limit: int = STRETCHES) -> Trace:
    """Return at most `limit` points of a trace: of each stretch the mean of what was measured, at its last place."""
    n = len(trace.y)
    count = min(n, limit)
    cuts = [i * n // count for i in range(count + 1)] if count else [0]
    pieces = list(pairwise(cuts))
    means = tuple(math.fsum(trace.y[a:b]) / (b - a) for a, b in pieces)
    return Trace(tuple(trace.x[b - 1] for _, b in pieces), means)


def _mean(traces: Sequence[Trace]) -> Trace:
    """Return the mean of traces that were measured at the same steps; as far as all of them go."""
    columns = zip(*(zip(trace.x, trace.y, strict=True) for trace in traces), strict=False)
    points = [tuple(math.fsum(values) / len(traces) for values in zip(*column, strict=True)) for column in columns]
    return Trace(tuple(x for x, _ in points), tuple(y for _, y in points))


def forest(record: StudyRecord, metric: str) -> str | None:
    """Draw the mean difference of every variant to the base with its 95% interval, and each pair as a dot."""
    rows = [row for row in record.compare(metric)[1:] if row.difference is not None]
    if not rows:
        return None
    base = record.values(record.plan.variants[0].name, metric)
    with drawing(f"{metric}-forest", width=6.0, height=1.2 + 0.4 * len(rows)) as (axes, drawn):
        floor = record.noise(metric)
        if floor:
            axes.axvspan(-floor, floor, color="#000000", alpha=0.06, linewidth=0)
        axes.axvline(0.0, color="#000000", linewidth=0.8)
        for i, row in enumerate(rows):
            pair, colour = row.difference, _LOOK[row.finding]
            assert pair is not None
            dots = [value - base[seed] for seed, value in row.values.items() if seed in base]
            axes.plot(dots, [i] * len(dots), ".", color=colour, alpha=0.5, markersize=5)
            ends = None if pair.low is None or pair.high is None else [[pair.mean - pair.low], [pair.high - pair.mean]]
            axes.errorbar([pair.mean], [i], xerr=ends, fmt="s", color=colour, capsize=3, markersize=5)
        axes.set_yticks(range(len(rows)), [f"{row.variant} ({row.finding.value})" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(f"{metric}, difference to {record.plan.variants[0].name}")
    return drawn[0]

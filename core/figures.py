"""The pictures of a report: each a function from a run's record to SVG text, or None where it has no data.

The same record gives the same bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

from tangram.core.drawing import COLOURS, DASHES, drawing, plain_thousands, thinned
from tangram.core.reports import RunRecord, Trace, number
from tangram.core.scores import NeedleGrid, PositionLosses

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from tangram.core.measure import Measures

LINES = 7
"""Most layers that are drawn as lines; more are drawn as a map."""

COLUMNS = 240
"""Most columns of a map."""


def _lines(axes: "Axes", traces: Mapping[str, Trace], x: str, y: str, above: bool = False) -> None:
    """Draw one line a trace, told apart by colour and dash; many have their legend above them."""
    handles = _plotted(axes, traces)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    plain_thousands(axes)
    if above:
        _legend_above(axes, handles, list(traces))
    elif len(traces) > 1:
        _legend(axes, handles, list(traces))


def _plotted(axes: "Axes", traces: Mapping[str, Trace], drawn: int = 0) -> "list[Artist]":
    """Draw one line a trace, in looks that follow those of the lines already drawn."""
    handles: list[Artist] = []
    looks = islice(zip(cycle(COLOURS), cycle(DASHES), strict=False), drawn, None)
    for trace, (colour, dash) in zip(map(thinned, traces.values()), looks, strict=False):
        mark = "o" if len(trace.x) < 3 else ""
        handles += axes.plot(trace.x, trace.y, color=colour, linestyle=dash, marker=mark, markersize=3)
    return handles


def _legend(axes: "Axes", handles: "Sequence[Artist]", names: Sequence[str]) -> None:
    axes.legend(handles, names, fontsize=9, framealpha=0.8, edgecolor="none")  # readable above crowded lines


def _legend_above(axes: "Axes", handles: "Sequence[Artist]", names: Sequence[str]) -> None:
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(handles, names, fontsize=9, frameon=False, ncols=4, loc="outside upper center")


def _losses(run: RunRecord, over: str, key: str, x: str) -> str | None:
    traces = {name: run.trace(f"loss.{name}", over) for name in run.objectives}
    traces = {name: trace for name, trace in traces.items() if trace.x}
    if not traces:
        return None
    # Held-out text has losses of tokens alone. Those of routing grow with the layers and have an axis of their own.
    held_out = {name for row in run.evaluations for name in row}
    routing = {name: trace for name, trace in traces.items() if f"eval.loss.{name}" not in held_out}
    token = {name: trace for name, trace in traces.items() if name not in routing}
    with drawing(key) as (axes, drawn):
        if not token or not routing:
            _lines(axes, traces, x, "loss")
        else:
            handles = _plotted(axes, token)
            beside = axes.twinx()
            handles += _plotted(beside, routing, len(token))
            beside.spines["right"].set_visible(True)
            beside.grid(visible=False)
            beside.set_ylabel(", ".join(routing))
            axes.set_xlabel(x)
            axes.set_ylabel("loss (nats)")
            plain_thousands(axes)
            _legend_above(axes, handles, [*token, *routing])
    return drawn[0]


def losses_over_tokens(run: RunRecord) -> str | None:
    """Draw every objective's loss over tokens."""
    return _losses(run, "tokens", "losses-tokens", "tokens")


def losses_over_seconds(run: RunRecord) -> str | None:
    """Draw every objective's loss over seconds."""
    return _losses(run, "seconds", "losses-seconds", "seconds")


def bits_per_byte(run: RunRecord) -> str | None:
    """Draw the bits per byte of held-out text, and what general compressors need for it."""
    trace = run.evaluated("eval.bits_per_byte")
    if not trace.x:
        return None
    last = run.evaluations[-1]
    tokens, bits = number(last.get("tokens")), number(last.get("eval.bits_per_byte"))
    with drawing("bits") as (axes, drawn):
        highest = max(*trace.y, *run.references.values(), bits or 0)
        (line,) = axes.plot(trace.x, trace.y, color=COLOURS[0], marker="o", markersize=4)
        handles: list[Artist] = [line]
        names = ["this run"]
        if tokens is not None and bits is not None and (tokens, bits) != (trace.x[-1], trace.y[-1]):
            handles += axes.plot(tokens, bits, color=COLOURS[0], marker="*", markersize=9, linestyle="")
            names[0] = "this run, on part of the text"
            names.append(f"on all of it ({bits:.2f})")
        for (name, bits), colour, dash in zip(run.references.items(), cycle(COLOURS[1:]), cycle(DASHES[1:])):
            handles.append(axes.axhline(bits, color=colour, linestyle=dash))
            names.append(f"{name} ({bits:.2f})")
        for (name, (tokens, bits)), mark in zip(_averaged(run).items(), cycle("DsP^")):
            handles += axes.plot(tokens, bits, color=COLOURS[6], marker=mark, markersize=6, linestyle="")
            names.append(f"averaged by {name} ({bits:.2f})")
            highest = max(highest, bits)
        axes.set_xlabel("tokens")
        axes.set_ylabel("bits per byte")
        axes.set_ylim(0, 1.08 * highest)
        plain_thousands(axes)
        _legend(axes, handles, names)
    return drawn[0]


def _averaged(run: RunRecord) -> dict[str, tuple[float, float]]:
    """Return tokens and bits per byte of each average of the weights."""
    points = {}
    for name, row in run.averaged.items():
        tokens, bits = number(row.get("tokens")), number(row.get("eval.bits_per_byte"))
        if tokens is not None and bits is not None:
            points[name] = (tokens, bits)
    return points


def expert_load(run: RunRecord) -> str | None:
    """Draw each expert's share of the tokens of its layer over the whole run, 1 when balanced."""
    rows = {layer: counts for layer, counts in sorted(run.load.items()) if sum(counts)}
    if not rows:
        return None
    widest = max(map(len, rows.values()))
    shares = [
        [count * len(counts) / sum(counts) for count in counts] + [float("nan")] * (widest - len(counts))
        for counts in rows.values()
    ]
    with drawing("load", height=_map_height(len(rows))) as (axes, drawn):
        from matplotlib.ticker import MaxNLocator

        # White is balanced; below 0 there is nothing, and twice the fair share is full colour.
        image = axes.imshow(shares, cmap="PuOr_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
        _layer_axis(axes, list(rows))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("expert")
        axes.figure.colorbar(image, ax=axes, extend="max", label="share, 1 is fair")
    return drawn[0]


def _single(run: RunRecord, column: str, label: str, log: bool = False, limit: float | None = None) -> str | None:
    trace = run.trace(column)
    if not trace.x:
        return None
    with drawing(column) as (axes, drawn):
        _lines(axes, {column: trace}, "tokens", label)
        if limit is not None:
            line = axes.axhline(limit, color=COLOURS[1], linestyle="--")
            _legend(axes, [line], [f"clipped above {limit:g}"])
        if log and min(trace.y) > 0:
            _log_scale(axes)
        elif min(trace.y) >= 0:
            axes.set_ylim(0, 1.08 * max(trace.y) or 1)
    return drawn[0]


def _log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _by_layer(run: RunRecord, column: str, label: str) -> str | None:
    """Draw a quantity of every layer: a line each, or a map of layers and steps where there are many."""
    traces = {layer: trace for layer, trace in run.by_layer(column, "step").items() if trace.x}
    if not traces:
        return None
    if len(traces) > LINES:
        return _layer_map(f"{column}-layers", traces, label)
    with drawing(f"{column}-layers") as (axes, drawn):
        _lines(axes, {f"layer {layer}": trace for layer, trace in traces.items()}, "step", label, above=True)
        if all(min(trace.y) >= 0 for trace in traces.values()):
            axes.set_ylim(bottom=0)
    return drawn[0]


def _layer_map(key: str, traces: Mapping[int, Trace], label: str) -> str:
    """Draw layers over steps, each cell the largest value of its stretch of steps."""
    first, last = _ends(traces)
    with drawing(key, height=_map_height(len(traces))) as (axes, drawn):
        extent = (first - 0.5, last + 0.5, len(traces) - 0.5, -0.5)
        cells = stretches(traces)
        image = axes.imshow(cells, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest", extent=extent)
        _layer_axis(axes, list(traces))
        plain_thousands(axes)
        axes.set_xlabel("step")
        axes.figure.colorbar(image, ax=axes, label=label)
    return drawn[0]


def _ends(traces: Mapping[int, Trace]) -> tuple[int, int]:
    return int(min(trace.x[0] for trace in traces.values())), int(max(trace.x[-1] for trace in traces.values()))


def stretches(traces: Mapping[int, Trace]) -> list[list[float]]:
    """Return a row a trace over steps, cut into at most `COLUMNS` equal stretches: of each the largest, nan of none."""
    first, last = _ends(traces)
    n = last - first + 1
    width = min(n, COLUMNS)
    cells = [[math.nan] * width for _ in traces]
    for row, trace in zip(cells, traces.values(), strict=True):
        for x, y in zip(trace.x, trace.y, strict=True):
            column = (int(x) - first) * width // n
            row[column] = y if math.isnan(row[column]) else max(y, row[column])
    return cells


def _map_height(layers: int) -> float:
    return min(1.6 + 0.22 * layers, 4.0)


def _layer_axis(axes: "Axes", layers: Sequence[int]) -> None:
    """Write the layers, or as many of them as there is room for, beside the rows of a map."""
    from matplotlib.ticker import FixedFormatter, FixedLocator

    every = -(-len(layers) // 16)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(FixedLocator(list(range(0, len(layers), every))))
    axes.yaxis.set_major_formatter(FixedFormatter([str(layer) for layer in layers[::every]]))
    axes.set_ylabel("layer")


def needle_map(grid: NeedleGrid) -> str:
    """Draw how many of the hidden facts were repeated, for each depth at each length."""
    with drawing(f"needle-{grid.weights}", height=_map_height(2 * len(grid.depths))) as (axes, drawn):
        image = axes.imshow(grid.scores, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.grid(visible=False)
        axes.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths])
        axes.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths])
        axes.set_xlabel("tokens of the context")
        axes.set_ylabel("depth of the fact")
        if len(grid.lengths) <= 8:
            for row, shares in enumerate(grid.scores):
                for column, share in enumerate(shares):
                    colour = "black" if share > 0.5 else "white"
                    said = f"{round(share * grid.needles)}"
                    axes.text(column, row, said, color=colour, ha="center", va="center")
        axes.figure.colorbar(image, ax=axes, label="share repeated")
    return drawn[0]


def position_losses(found: PositionLosses) -> str:
    """Draw the loss of each range of positions, and how far the run was trained."""
    with drawing(f"positions-{found.weights}") as (axes, drawn):
        axes.set_xscale("log", base=2)
        axes.stairs(found.losses, (found.stops[0] / 2, *found.stops), baseline=None, color=COLOURS[0], linewidth=2)
        if found.trained < found.stops[-1]:
            axes.axvline(found.trained, color=COLOURS[-1], linestyle=":", label="trained on so many at a time")
            axes.legend()
        axes.set_xticks(found.stops, [f"{stop:,}" for stop in found.stops])
        axes.minorticks_off()
        axes.set_xlabel("position")
        axes.set_ylabel("loss, nats per token")
    return drawn[0]


def violation(run: RunRecord) -> str | None:
    """Draw MaxVio of each step, the mean over layers."""
    return _single(run, "violation", "load violation")


def expert_bias(run: RunRecord) -> str | None:
    """Draw the largest expert bias."""
    return _single(run, "bias", "largest expert bias")


def violation_by_layer(run: RunRecord) -> str | None:
    """Draw MaxVio of each layer."""
    return _by_layer(run, "violation", "load violation")


def fp8_error_by_layer(run: RunRecord) -> str | None:
    """Draw the relative error of each layer's worst product in FP8."""
    return _by_layer(run, "eval.fp8_error", "relative error")


def fp8_underflow_by_layer(run: RunRecord) -> str | None:
    """Draw the share of inputs that are zero in FP8, the largest of each layer."""
    return _by_layer(run, "eval.fp8_underflow", "share that becomes zero")


def bias_by_layer(run: RunRecord) -> str | None:
    """Draw the largest expert bias of each layer."""
    return _by_layer(run, "bias", "largest expert bias")


def learning_rate(run: RunRecord) -> str | None:
    """Draw the learning rate."""
    return _single(run, "lr", "learning rate")


def gradient_norm(run: RunRecord) -> str | None:
    """Draw the gradient norm before clipping, and the limit."""
    return _single(run, "grad_norm", "gradient norm", log=True, limit=number(run.setting("train.clip")))


def _bars(key: str, parts: Mapping[str, int], label: str) -> str | None:
    total = sum(parts.values())
    if not total:
        return None
    with drawing(key, height=1.0 + 0.32 * len(parts)) as (axes, drawn):
        axes.grid(visible=False, axis="y")
        bars = axes.barh(list(parts), list(parts.values()), color=COLOURS[0])
        axes.bar_label(bars, [f"{100 * value / total:.1f} %" for value in parts.values()], padding=3, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        plain_thousands(axes)
        axes.set_xlabel(label)
    return drawn[0]


def parameter_parts(run: RunRecord) -> str | None:
    """Draw where the parameters are."""
    return _bars("parameters", parameters_of(run.measures), "parameters") if run.measures else None


def flop_parts(run: RunRecord) -> str | None:
    """Draw where the operations of a training token go."""
    return _bars("flops", flops_of(run.measures), "FLOP per training token") if run.measures else None


def parameters_of(measures: "Measures") -> dict[str, int]:
    """Return the parameters by part; they add up to those of the main model and of multi-token prediction."""
    known = measures.parameters
    parts = {
        "embedding": known.embedding,
        "attention": known.attention,
        "feed-forward": known.feedforward,
        "head": known.head,
    }
    return parts | {"norms": known.total - sum(parts.values()), "objectives": known.mtp}


def flops_of(measures: "Measures") -> dict[str, int]:
    """Return the operations of one training token by part; they add up to `training_flops_per_token`."""
    known = measures.parameters
    norms = parameters_of(measures)["norms"]
    weights = {
        "attention weights": known.attention,
        "feed-forward": known.active - known.attention - known.head - norms,
        "head": known.head,
        "norms": norms,
    }
    parts = {name: 6 * count for name, count in weights.items()}
    return parts | {"token products": measures.training_flops_per_token - sum(parts.values())}


FIGURES: Sequence[tuple[str, str, Callable[[RunRecord], str | None]]] = (
    (
        "Losses over tokens",
        "Each objective, unweighted; those of tokens in nats per target.",
        losses_over_tokens,
    ),
    ("Losses over seconds", "The same against the clock, what came before a resume included.", losses_over_seconds),
    (
        "Held-out bits per byte",
        "Lower is better; all but the last point of the run are on part of the text.",
        bits_per_byte,
    ),
    (
        "Expert load",
        "Share of a layer's tokens over the whole run; white is balanced; MTP is last.",
        expert_load,
    ),
    ("Load violation", "MaxVio, (max - mean) / mean of a step's load, mean over layers.", violation),
    (
        "Load violation by layer",
        "Each layer of that mean; a cell of a map is the largest of its steps.",
        violation_by_layer,
    ),
    ("Expert bias", "The largest absolute bias of any expert after the step.", expert_bias),
    ("Expert bias by layer", "The largest of each layer; a cell of a map is the largest of its steps.", bias_by_layer),
    (
        "FP8 error by layer",
        "Of each layer's products on one held-out batch, the one that is off most: the norm of its error over its own.",
        fp8_error_by_layer,
    ),
    (
        "FP8 underflow by layer",
        "The largest share of a product's inputs that become zero, on the same batch.",
        fp8_underflow_by_layer,
    ),
    ("Learning rate", "As set for each step.", learning_rate),
    ("Gradient norm", "Before clipping.", gradient_norm),
    ("Parameters", "Weights by part, all experts counted.", parameter_parts),
    ("Operations", "Of forward and backward for one token of the main model, by part.", flop_parts),
)
"""Every picture in order: its title, what it shows, and what draws it."""

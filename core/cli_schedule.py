"""The command `schedule`; torch is imported inside it."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tangram.core.parameters import Files, Json, Overrides
from tangram.core.terminal import OK, as_json, refuse, say, table

if TYPE_CHECKING:
    from tangram.core.contracts import Pipeline
    from tangram.core.simulator import Costs

_COSTS = {"F": "forward", "I": "input", "W": "weight", "FB": "overlap", "latency": "latency"}


def schedule(
    pipeline: str,
    /,
    *overrides: Overrides,
    ranks: int,
    microbatches: int,
    costs: Annotated[str, Parameter(help="What each kind of work takes, such as F=1,I=1,W=1,FB=3,latency=0.")] = "",
    svg: Path | None = None,
    json_: Json = False,
    plugin: Files = (),
) -> int:
    """Simulate a pipeline's schedule and draw who does what, and when.

    Args:
        pipeline: The pipeline's name, as `tangram list pipeline` has it; overrides are of its own settings.
        ranks: Pipeline ranks.
        microbatches: Micro-batches of a step.
        svg: Draw the chart into this file too.
    """
    from tangram.core.simulator import simulate

    asked = _costs(costs)
    if isinstance(asked, str):
        return refuse(asked)
    built = _build(pipeline, overrides, plugin)
    if isinstance(built, str):
        return refuse(built)
    try:
        plan = built.schedule(ranks, microbatches)
    except ValueError as error:
        return refuse(str(error))
    timeline, promise = simulate(plan, asked), built.promises(ranks, microbatches, asked)
    title = f"{pipeline}: {ranks} ranks, {microbatches} micro-batches"
    if svg is not None:
        from tangram.core.files import write_whole
        from tangram.core.gantt import picture

        write_whole(svg, picture(plan, timeline, title))
    if json_:
        return as_json(
            {
                "makespan": timeline.makespan,
                "bubble": list(timeline.bubble),
                "peak": list(timeline.peak),
                "formula": promise.bubble,
                "program": [plan.text(rank) for rank in range(plan.ranks)],
            }
        )
    from tangram.core.gantt import LEGEND, lines

    width = max(shutil.get_terminal_size((160, 24)).columns - 5, 20)
    for line in lines(timeline, width):
        say(line)
    say(LEGEND)
    rows = zip(timeline.bubble, timeline.peak, strict=True)
    table(("rank", "bubble", "live at once"), [(str(n), f"{idle:g}", str(live)) for n, (idle, live) in enumerate(rows)])
    known = "no closed form holds" if promise.bubble is None else f"the closed form says {promise.bubble:g}"
    say(f"{title}: makespan {timeline.makespan:g}, longest bubble {max(timeline.bubble):g}; {known}")
    return OK


def _costs(text: str) -> "Costs | str":
    """Return the costs, or what is wrong with them."""
    from tangram.core.simulator import Costs

    values: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name.strip() not in _COSTS:
            return f"--costs knows {', '.join(_COSTS)}, not {name.strip()!r}"
        try:
            values[_COSTS[name.strip()]] = float(value)
        except ValueError:
            return f"--costs: {name.strip()} is {value!r}; it is a number"
    try:
        return Costs(**values)
    except ValueError as error:
        return f"--costs: {error.args[0]}"


def _build(name: str, overrides: tuple[str, ...], files: tuple[Path, ...]) -> "Pipeline | str":
    """Return the pipeline, or that there is none of this name."""
    from tangram.core.config import DEFAULT, Node, merge, override, suggest
    from tangram.core.plugins import Plugins
    from tangram.core.structuring import structure

    registry = Plugins.discover(files).registry
    entry = registry.get("pipeline", name)
    if entry is None:
        known = registry.uses("pipeline")
        return f"there is no pipeline '{name}'{suggest(name, known)}; there are {', '.join(known)}"
    tree = Node.of({}, DEFAULT)
    for change in overrides:
        tree = merge(tree, override(change))
    built: Pipeline = structure(tree, entry.config, registry).build()
    return built

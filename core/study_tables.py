"""The tables of a study. Each is one object, from which Markdown, LaTeX and HTML are written."""

import json
import shlex

from attrs import frozen

from tangram.core.statistics import FEWEST, LEVEL
from tangram.core.study_record import Comparison, StudyRecord, VariantPlan

_NONE = "–"


@frozen
class Table:
    """A table: what every rendering is made from.

    Attributes:
        title: Its heading.
        caption: What a reader must know to read it.
        header: Names of the columns.
        rows: The cells, as text.
    """

    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(record: StudyRecord) -> list[Table]:
    """Return every table of a study, in order."""
    return [
        *(_verdicts(record, metric) for metric in record.plan.metrics),
        _costs(record),
        _values(record),
        _differences(record),
        _troubles(record),
        _versions(record),
    ]


def _verdicts(record: StudyRecord, metric: str) -> Table:
    better, base = record.plan.metrics[metric], record.plan.variants[0].name
    caption = (
        f"{better.capitalize()} is better. The difference to {base} is over pairs of runs with the same seed, with "
        f"the 95% Student-t interval of its mean; p is corrected for the number of variants (Holm), and below "
        f"{LEVEL:g} a variant is better or worse. Within noise: the whole interval is closer to 0 than two runs of "
        f"{base} usually are to each other, {record.noise(metric):.2g}. Fewer than {FEWEST} seeds: no verdict."
    )
    header = ("variant", metric, "difference", "95% interval", "p (Holm)", "seeds", "correlation", "verdict")
    return Table(f"Verdict: {metric}", caption, header, tuple(_verdict(row) for row in record.compare(metric)))


def _verdict(row: Comparison) -> tuple[str, ...]:
    mean = sum(row.values.values()) / len(row.values) if row.values else None
    shown = (row.variant, _shown(mean, ".4f"))
    pair = row.difference
    if pair is None:
        return (*shown, _NONE, _NONE, _NONE, str(len(row.values)), _NONE, "")
    interval = _NONE if pair.low is None or pair.high is None else f"[{pair.low:+.4f}, {pair.high:+.4f}]"
    return (
        *shown,
        f"{pair.mean:+.4f}",
        interval,
        _shown(row.p, ".2g"),
        str(pair.n),
        _shown(pair.correlation, ".2f"),
        row.finding.value,
    )


def _shown(value: float | None, style: str) -> str:
    return _NONE if value is None else format(value, style)


def _costs(record: StudyRecord) -> Table:
    caption = (
        f"{record.plan.statement} Parameters and operations are those of the main model: what objectives own is not "
        "counted. Time and memory are means over the seeds, on the machine that ran them."
    )
    header = ("variant", "parameters", "active", "training FLOP", "tokens", "residual", "seconds", "memory, MiB")
    return Table(
        "What was held equal, and what it cost", caption, header, tuple(_cost(record, v) for v in record.plan.variants)
    )


def _cost(record: StudyRecord, plan: VariantPlan) -> tuple[str, ...]:
    cells = record.cells[plan.name].values()
    seconds = _seconds(record, plan.name).values()
    memory = [cell.memory for cell in cells if cell.memory is not None]
    return (
        plan.name,
        f"{plan.parameters:,}",
        f"{plan.active:,}",
        f"{plan.flops:.3e}",
        f"{plan.tokens:,}",
        _shown(_residual(record, plan), "+.2%"),
        _shown(sum(seconds) / len(seconds) if seconds else None, ",.1f"),
        _shown(sum(memory) / len(memory) / 2**20 if memory else None, ",.0f"),
    )


def _residual(record: StudyRecord, plan: VariantPlan) -> float | None:
    """Return what is left of the difference in what is matched: of time what was measured, over pairs of runs."""
    if record.plan.match != "time":
        return plan.residual
    base, here = (_seconds(record, name) for name in (record.plan.variants[0].name, plan.name))
    shared = base.keys() & here.keys()
    if plan.name == record.plan.variants[0].name or not shared:
        return None
    return sum(here[seed] for seed in shared) / sum(base[seed] for seed in shared) - 1


def _seconds(record: StudyRecord, variant: str) -> dict[int, float]:
    cells = record.cells[variant].items()
    known = {seed: cell.seconds for seed, cell in cells if cell.cell.state == "done"}
    return {seed: seconds for seed, seconds in known.items() if seconds is not None}


def _values(record: StudyRecord) -> Table:
    header = ("metric", "variant", *(f"seed {seed}" for seed in record.plan.seeds))
    rows = []
    for metric in record.plan.metrics:
        for plan in record.plan.variants:
            known = record.values(plan.name, metric)
            rows.append((metric, plan.name, *(_shown(known.get(seed), ".4f") for seed in record.plan.seeds)))
    return Table("Every run", "", header, tuple(rows))


def _differences(record: StudyRecord) -> Table:
    base = record.plan.variants[0].name
    rows = [
        (plan.name, path, json.dumps(there), json.dumps(here))
        for plan in record.plan.variants[1:]
        for path, (there, here) in plan.difference.items()
    ]
    header = ("variant", "path", base, "variant's")
    return Table("What differs from the base", "Leaves of the resolved presets.", header, tuple(rows))


def _troubles(record: StudyRecord) -> Table:
    rows = tuple((c.cell.variant, str(c.cell.seed), c.cell.state, c.cell.why or _NONE, c.cell.id) for c in record.bad)
    caption = "Cells that are not done; no number above is theirs." if rows else "Every cell is done."
    return Table("Failed, diverged and unfinished cells", caption, ("variant", "seed", "state", "why", "cell"), rows)


def _versions(record: StudyRecord) -> Table:
    return Table("Versions", "", ("what", "version"), tuple(record.plan.versions.items()))


def commands(record: StudyRecord) -> str:
    """Return the exact commands: of the study, and of one cell by itself."""
    cell = next(iter(record.plan.variants[0].cells.values()))
    return f"{shlex.join(record.plan.command)}\ntangram train cells/{cell}/experiment.yaml --out elsewhere"

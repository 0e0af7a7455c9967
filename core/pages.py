"""The report of a run: one HTML file that needs nothing else, no network and no script."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from tangram.core.figures import FIGURES, needle_map, position_losses
from tangram.core.files import write_whole
from tangram.core.liveness import Piece
from tangram.core.markup import NO_DATA, document, dotted, figure, none, table, text, verbatim
from tangram.core.reports import RunRecord, number, read_run


def write_report(directory: str | Path, plugins: Sequence[str | Path] = ()) -> Path:
    """Write report.html into a run directory, from what lies in it alone, and return its path.

    Args:
        directory: The run directory.
        plugins: Plugin files to load, as for `read_run`.

    Raises:
        ForeignCodeError: The run needs plugin files that are not in `plugins`.
        ReportError: It is no run directory.
        ConfigError: Its experiment.yaml cannot be read.
    """
    path = Path(directory) / "report.html"
    write_whole(path, page(read_run(directory, plugins)))
    return path


def page(run: RunRecord) -> str:
    """Return the report as HTML. The same record gives the same text."""
    sections = [
        ("Curves", _figures(run)),
        ("Held-out text", _held_out(run)),
        ("Tasks, hidden facts and positions", _scores(run)),
        ("Pieces", _pieces(run)),
        ("Costs", _costs(run)),
        ("Sample", verbatim(run.sample)),
        ("Speculation", _speculation(run)),
        ("Preset", _settings(run)),
        ("How it was run", _about(run)),
    ]
    body = "\n".join(f"<section>\n<h2>{title}</h2>\n{content}\n</section>" for title, content in sections)
    return document(run.name, f"{_summary(run)}\n{_gaps(run)}{body}")


def summary(run: RunRecord) -> dict[str, str]:
    """Return the numbers that stand at the top, by name, as people read them."""
    last, final = (run.steps or ({},))[-1], (run.evaluations or ({},))[-1]
    seconds = number(last.get("seconds"))
    bits = number(final.get("eval.bits_per_byte"))
    part = "" if final.get("eval.complete") else " (on part)"
    shown = {
        "steps": f"{len(run.steps):,}" + (f" ({run.refused} refused)" if run.refused else ""),
        "tokens": _figure(number(last.get("tokens")), ",.0f"),
        "time": NO_DATA if seconds is None else f"{seconds / 60:,.1f} min",
        "last loss, weighted": _figure(number(last.get("loss")), ".3f"),
        "held-out bits per byte": NO_DATA if bits is None else f"{bits:.3f}{part}",
    }
    for name, row in run.averaged.items():
        shown[f"averaged by {name}"] = _figure(number(row.get("eval.bits_per_byte")), ".3f")
    shown |= {f"the same by {name}": f"{value:.3f}" for name, value in run.references.items()}
    if run.held_out_bytes:
        shown["held-out bytes"] = f"{run.held_out_bytes:,}"
    if run.measures is not None:
        shown["parameters"] = f"{run.measures.parameters.total:,}"
    return shown


def _figure(value: float | None, style: str) -> str:
    return NO_DATA if value is None else format(value, style)


def _summary(run: RunRecord) -> str:
    tiles = (f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in summary(run).items())
    return "<dl>\n" + "\n".join(tiles) + "\n</dl>"


def _gaps(run: RunRecord) -> str:
    return "".join(f'<p class="none">{text(gap)}</p>\n' for gap in run.gaps)


def _figures(run: RunRecord) -> str:
    parts = []
    for title, caption, draw in FIGURES:
        drawn = draw(run)
        parts.append(figure(title, caption, drawn))
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"


def _held_out(run: RunRecord) -> str:
    """Return the last evaluation, with the last weights and with every average of them."""
    if not run.evaluations:
        return none("nothing was held out, or the run ended before its first evaluation")
    evaluated = {"last": run.evaluations[-1]} | {f"averaged by {name}": row for name, row in run.averaged.items()}
    losses = [name for name in run.evaluations[-1] if name.startswith("eval.loss.")]
    header = ("weights", "bits per byte", *(text(name.removeprefix("eval.loss.")) for name in losses))
    rows = [
        (text(name), *(_figure(number(row.get(column)), ".3f") for column in ("eval.bits_per_byte", *losses)))
        for name, row in evaluated.items()
    ]
    return table(header, rows)


def _scores(run: RunRecord) -> str:
    """Return what was scored on tasks, a map for every grid of hidden facts, and the losses by position."""
    if not (run.scores or run.grids or run.positions):
        return none("tangram evaluate RUN --tasks FILE, --needle, or --positions LENGTH, has not been asked")
    rows = [
        (
            dotted(score.task),
            text(f"{score.weights}, step {score.step:,}"),
            f"{score.items:,}",
            f"{score.shots:,}",
            text(metric.name),
            _figure(metric.value, ".3f") + ("" if metric.error is None else f" ± {metric.error:.3f}"),
        )
        for score in run.scores
        for metric in score.metrics
    ]
    header = ("task", "weights", "items", "shots", "metric", "value ± standard error")
    drawn = [
        figure(
            f"Needle in a haystack, {grid.weights} weights",
            f"Facts repeated, of {grid.needles} hidden in {grid.text} text at each place; step {grid.step:,}, "
            f"trained on {grid.trained:,} tokens at a time.",
            needle_map(grid),
        )
        for grid in run.grids
    ]
    drawn += [
        figure(
            f"Loss by position, {found.weights} weights",
            f"Held-out text in sequences of {found.stops[-1]:,} tokens; step {found.step:,}.",
            position_losses(found),
        )
        for found in run.positions
    ]
    figures = '<div class="figures">\n' + "\n".join(drawn) + "\n</div>" if drawn else ""
    return (table(header, rows) if rows else "") + figures


def _pieces(run: RunRecord) -> str:
    if not run.pieces:
        return none("the run has not ended well, or was made before verdicts were kept")
    rows = [(dotted(piece.name), _word(piece), text(piece.why)) for piece in run.pieces]
    return table(("piece", "verdict", "what was seen"), rows)


def _word(piece: Piece) -> str:
    if piece.alive is None:
        return "too short to tell"
    return "alive" if piece.alive else '<span class="dead">dead</span>'


def _costs(run: RunRecord) -> str:
    rows = []
    if run.measures is not None:
        parameters = run.measures.parameters
        counts = {
            "parameters, main model": parameters.total,
            "parameters, active for one token": parameters.active,
            "parameters, owned by objectives": parameters.mtp,
            "cache bytes per token": run.measures.kv_cache_bytes_per_token,
            "training operations per token": run.measures.training_flops_per_token,
        }
        rows += [(name, f"{count:,}") for name, count in counts.items()]
    if run.saving:
        held_up, share = (
            _figure(run.saving.get(name), style) for name, style in (("held_up", ".2f"), ("share", ".1%"))
        )
        rows.append(("seconds that training waited for checkpoints", f"{held_up} ({share})"))
    return table(("cost", "measured or counted"), rows) if rows else none()


def _speculation(run: RunRecord) -> str:
    """Return how far the MTP modules' drafts are right."""
    if not run.speculation:
        return none("the preset has no MTP module, or the run ended before its end")
    rows = [
        (text(name), f"{share:.2f}" if name == "tokens a round" else f"{share:.1%} of the drafts kept")
        for name, share in run.speculation.items()
    ]
    return table(("continuing held-out text", "found"), rows)


def _settings(run: RunRecord) -> str:
    rows = [
        (dotted(s.path), text(json.dumps(s.value, ensure_ascii=False)), dotted(s.origin or "not known"))
        for s in run.settings
    ]
    listed = table(("path", "value", "written in"), rows)
    return f"<details><summary>All {len(rows)} values, every default spelled out</summary>\n{listed}\n</details>"


def _about(run: RunRecord) -> str:
    rows = [(text(name), text(version)) for name, version in run.versions.items()]
    rows.append(("data", text(run.data or NO_DATA)))
    if run.start:
        rows.append(("started from the weights of", text(run.start)))
    command = verbatim(shlex.join(run.command))
    return f"{command}\n{table(('what', 'version or fingerprint'), rows)}"

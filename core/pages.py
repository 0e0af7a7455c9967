"""The report of a run: one HTML file that needs nothing else, no network and no script."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from tangram.core.figures import FIGURES
from tangram.core.files import write_whole
from tangram.core.liveness import Piece
from tangram.core.reports import RunRecord, number, read_run

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The content security policy: nothing is loaded, nothing runs."""

NO_DATA = "no data"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: #1c1c1c; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1rem; margin: 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .5rem; margin: 0; }
dl div { background: #f3f5f7; border-radius: .4rem; padding: .5rem .75rem; }
dt { color: #555; font-size: .85rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; }
figcaption p { margin: 0; color: #555; font-size: .85rem; }
svg { display: block; width: 100%; height: auto; max-width: 40rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #e4e4e4; }
td { overflow-wrap: anywhere; min-width: 5rem; }
td:first-child { overflow-wrap: break-word; }
pre { background: #f3f5f7; border-radius: .4rem; padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #0059a0; }
.none { color: #555; font-style: italic; }
.dead { color: #a02c00; font-weight: 600; }
"""


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
        ("Pieces", _pieces(run)),
        ("Costs", _costs(run)),
        ("Sample", _verbatim(run.sample)),
        ("Preset", _settings(run)),
        ("How it was run", _about(run)),
    ]
    body = "\n".join(f"<section>\n<h2>{title}</h2>\n{content}\n</section>" for title, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(run.name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(run.name)}</h1>\n{_summary(run)}\n{_gaps(run)}{body}\n</body>\n</html>\n"
    )


def _text(value: str) -> str:
    """Return text as HTML: what could be markup is escaped, and what is no character is replaced."""
    printable = "".join(c if c in "\n\t" or (c >= " " and not "\ud800" <= c <= "\udfff") else "\ufffd" for c in value)
    return escape(printable)


def _name(value: str) -> str:
    """Return a dotted name as HTML that may break where its words end."""
    return re.sub(r"[._/]+", r"\g<0><wbr>", _text(value))


def _none(why: str = "") -> str:
    return f'<p class="none">{NO_DATA}{": " if why else ""}{_text(why)}</p>'


def _verbatim(text: str) -> str:
    return f"<pre>{_text(text)}</pre>" if text else _none()


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the cells are HTML already."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


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
    tiles = (f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in summary(run).items())
    return "<dl>\n" + "\n".join(tiles) + "\n</dl>"


def _gaps(run: RunRecord) -> str:
    return "".join(f'<p class="none">{_text(gap)}</p>\n' for gap in run.gaps)


def _figures(run: RunRecord) -> str:
    parts = []
    for title, caption, draw in FIGURES:
        drawn = draw(run)
        picture = drawn.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1) if drawn else _none()
        parts.append(f"<figure>\n<figcaption><h3>{title}</h3><p>{caption}</p></figcaption>\n{picture}\n</figure>")
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"


def _held_out(run: RunRecord) -> str:
    """Return the last evaluation, with the last weights and with every average of them."""
    if not run.evaluations:
        return _none("nothing was held out, or the run ended before its first evaluation")
    evaluated = {"last": run.evaluations[-1]} | {f"averaged by {name}": row for name, row in run.averaged.items()}
    losses = [name for name in run.evaluations[-1] if name.startswith("eval.loss.")]
    header = ("weights", "bits per byte", *(_text(name.removeprefix("eval.loss.")) for name in losses))
    rows = [
        (_text(name), *(_figure(number(row.get(column)), ".3f") for column in ("eval.bits_per_byte", *losses)))
        for name, row in evaluated.items()
    ]
    return _table(header, rows)


def _pieces(run: RunRecord) -> str:
    if not run.pieces:
        return _none("the run has not ended well, or was made before verdicts were kept")
    rows = [(_name(piece.name), _word(piece), _text(piece.why)) for piece in run.pieces]
    return _table(("piece", "verdict", "what was seen"), rows)


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
    return _table(("cost", "measured or counted"), rows) if rows else _none()


def _settings(run: RunRecord) -> str:
    rows = [
        (_name(s.path), _text(json.dumps(s.value, ensure_ascii=False)), _name(s.origin or "not known"))
        for s in run.settings
    ]
    table = _table(("path", "value", "written in"), rows)
    return f"<details><summary>All {len(rows)} values, every default spelled out</summary>\n{table}\n</details>"


def _about(run: RunRecord) -> str:
    rows = [(_text(name), _text(version)) for name, version in run.versions.items()]
    rows.append(("data", _text(run.data or NO_DATA)))
    command = _verbatim(shlex.join(run.command))
    return f"{command}\n{_table(('what', 'version or fingerprint'), rows)}"

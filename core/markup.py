"""The HTML that all reports share: one file that needs nothing else, no network and no script."""

import re
from collections.abc import Iterable, Sequence
from html import escape

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
.scroll + figure { margin-top: 1rem; }
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


def document(title: str, body: str) -> str:
    """Return a page; the body is HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{text(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def figure(title: str, caption: str, drawn: str | None) -> str:
    """Return a picture with its title; the caption is text, and None of a picture says that there is no data."""
    picture = drawn.replace("<svg ", f'<svg role="img" aria-label="{text(title)}" ', 1) if drawn else none()
    return f"<figure>\n<figcaption><h3>{text(title)}</h3><p>{text(caption)}</p></figcaption>\n{picture}\n</figure>"


def text(value: str) -> str:
    """Return text as HTML: what could be markup is escaped, and what is no character is replaced."""
    printable = "".join(c if c in "\n\t" or (c >= " " and not "\ud800" <= c <= "\udfff") else "\ufffd" for c in value)
    return escape(printable)


def dotted(value: str) -> str:
    """Return a dotted name as HTML that may break where its words end."""
    return re.sub(r"[._/]+", r"\g<0><wbr>", text(value))


def none(why: str = "") -> str:
    """Return the word for what is not there."""
    return f'<p class="none">{NO_DATA}{": " if why else ""}{text(why)}</p>'


def verbatim(content: str) -> str:
    """Return text as it is written, with its line breaks."""
    return f"<pre>{text(content)}</pre>" if content else none()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the cells are HTML already."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'

"""Write docs/components.md: `python docs/components.py > docs/components.md`."""

from tangram.core.contracts import SLOTS
from tangram.core.plugins import Plugins
from tangram.core.registry import Entry
from tangram.core.schema import fields, paper, summary


def page() -> str:
    """Return every component of the tree with its paper and its keys, as Markdown."""
    entries = [entry for entry in Plugins.discover().registry if entry.origin == "tangram"]
    made = "Made by `python docs/components.py > docs/components.md` from what the components say of themselves.\n"
    parts = ["# Components\n", made]
    for slot in SLOTS:
        parts.append(f"## {slot}\n")
        parts += [_section(entry) for entry in entries if entry.mark.slot == slot]
    return "\n".join(parts)


def _section(entry: Entry) -> str:
    cited = paper(entry.config)
    lines = [f"### {entry.mark.use}\n", summary(entry.config) + (f" ({cited})" if cited else "") + "\n"]
    rows = [f"| `{f.name}` | {_cell(f.type)} | {_cell(f.default)} | {_cell(f.doc)} |" for f in fields(entry.config)]
    if rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    print(page(), end="")

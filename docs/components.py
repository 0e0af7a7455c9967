"""Write docs/components.md: `python docs/components.py > docs/components.md`."""

from tangram.core import experiment
from tangram.core.contracts import SLOTS
from tangram.core.plugins import Plugins
from tangram.core.registry import Entry
from tangram.core.schema import fields, paper, summary

PLACES = {
    "the preset itself": experiment.Experiment,
    "model": experiment.ModelConfig,
    "model.block": experiment.BlockConfig,
    "an element of model.blocks": experiment.BlockGroup,
    "parallel": experiment.ParallelConfig,
    "train": experiment.TrainConfig,
}
"""Where the keys stand that are no component's."""


def page() -> str:
    """Return every key of a preset and every component of the tree with its paper and its keys, as Markdown."""
    entries = [entry for entry in Plugins.discover().registry if entry.origin == "tangram"]
    made = "Made by `python docs/components.py > docs/components.md` from what the components say of themselves.\n"
    parts = ["# Components\n", made, "## The keys around them\n"]
    parts += [f"### {place}\n\n{summary(config)}\n\n{_keys(config)}" for place, config in PLACES.items()]
    for slot in SLOTS:
        parts.append(f"## {slot}\n")
        parts += [_section(entry) for entry in entries if entry.mark.slot == slot]
    return "\n".join(parts)


def _section(entry: Entry) -> str:
    cited = paper(entry.config)
    lines = [f"### {entry.mark.use}\n", summary(entry.config) + (f" ({cited})" if cited else "") + "\n"]
    return "\n".join([*lines, keys] if (keys := _keys(entry.config)) else lines)


def _keys(config: type) -> str:
    rows = [f"| `{f.name}` | {_cell(f.type)} | {_cell(f.default)} | {_cell(f.doc)} |" for f in fields(config)]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]) if rows else ""


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    print(page(), end="")

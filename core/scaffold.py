"""A package to start from: a small component that works, its tests, and a study that compares it."""

import keyword
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from string import Template
from textwrap import indent

from attrs import frozen

from tangram.core.config import suggest
from tangram.core.contracts import SLOTS
from tangram.core.plugins import Plugins


class ScaffoldError(Exception):
    """No package can be written; the message says why and what to do."""


@frozen
class Starter:
    """What the files of a slot's package say, besides the component.

    Attributes:
        patch: Where a preset names the component: a patch on v3-tiny, with `USE` for its name.
        arguments: Arguments of the config that the tests build.
        contract: Beginning of the name of its contract in `tangram.testing`.
        shared: What the study lays over both variants, below the rest.
        variant: Name of the variant; `USE` for the component's.
        varied: The variant's patch, if it is not `patch`.
        metric: What the study compares.
    """

    patch: str
    arguments: str = ""
    contract: str = ""
    shared: str = ""
    variant: str = "USE"
    varied: str = ""
    metric: str = "eval.bits_per_byte"


_MOE = "model:\n  block:\n    feedforward:\n      "

STARTERS: Mapping[str, Starter] = {
    "attention": Starter(
        "model:\n  block:\n    attention: {use: USE, n_heads: 4, head_dim: 16}", "n_heads=2, head_dim=4"
    ),
    "feedforward": Starter(
        "model:\n  blocks:\n    - {repeat: 1, feedforward: {use: USE, hidden: 288}}\n    - {repeat: 2}",
        "hidden=5",
        contract="FeedForward",
    ),
    "router": Starter(f"{_MOE}router: {{use: USE, top_k: 2}}", "top_k=2, temperature=0.7"),
    "balancer": Starter(f"{_MOE}balancer: {{use: USE, speed: 0.01}}"),
    "dispatcher": Starter(f"{_MOE}dispatcher: {{use: USE}}"),
    "objective": Starter("objectives:\n  USE: {weight: 0.001}"),
    "precision": Starter("precision: {use: USE, products: float64}"),
    "pipeline": Starter("parallel:\n  pipeline: {use: USE}"),
    "sharding": Starter("parallel:\n  sharding: {use: USE}"),
    "optimizer": Starter("optimizer: {use: USE}"),
    "guard": Starter("guard: {use: USE, norm: 100.0}"),
    "data": Starter(
        "data: {use: USE, period: 16}",
        shared="data: {use: USE, period: 16}",
        variant="longer",
        varied="data: {period: 32}",
        metric="loss.next_token",
    ),
    "observer": Starter("observers:\n  USE: {every: 5}"),
}
"""Every slot that a preset names."""


def write_package(name: str, slot: str, folder: Path, plugins: Plugins) -> list[Path]:
    """Write a package with a component of `slot` into a folder that is new or empty; return its files.

    Raises:
        ScaffoldError: The name or the slot does not do, or the folder has something in it.
    """
    _check_slot(slot)
    module = name.replace("-", "_")
    _check_name(name, module, slot, plugins)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ScaffoldError(f"{folder} is there already; choose another with --out")
    written = []
    for file, content in _files(name, module, slot):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        written.append(path)
    return written


def _check_slot(slot: str) -> None:
    if slot in STARTERS:
        return
    if slot in SLOTS:
        raise ScaffoldError(f"there is no package to start from for the slot {slot}: copy one of its components")
    raise ScaffoldError(f"there is no slot '{slot}'{suggest(slot, STARTERS)}")


def _check_name(name: str, module: str, slot: str, plugins: Plugins) -> None:
    """Check that `name` can be a distribution, a module and a component that are not there yet."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or keyword.iskeyword(module):
        words = "-".join(re.findall(r"[a-z][a-z0-9]*", name.lower()))
        better = words if words and not keyword.iskeyword(words) else "my-" + (words or slot)
        raise ScaffoldError(f"'{name}' cannot be the name of a package: small letters, digits and -, such as {better}")
    entry = plugins.registry.get(slot, module)
    if entry is not None:
        raise ScaffoldError(
            f"there is a {slot} '{module}' already, of {entry.origin}: choose another, such as my-{name}"
        )
    if module in sys.stdlib_module_names or find_spec(module) is not None:
        raise ScaffoldError(f"there is a Python module '{module}' already: choose a name such as my-{name}")


def _files(package: str, module: str, slot: str) -> Iterator[tuple[str, str]]:
    """Yield the files by path inside the package."""
    starter = STARTERS[slot]
    patch = starter.patch.replace("USE", module)
    shared = f"{starter.shared.replace('USE', module)}\n" if starter.shared else ""
    words = {
        "package": package,
        "module": module,
        "use": module,
        "name": "".join(word.capitalize() for word in module.split("_")),
        "slot": slot,
        "version": metadata.version("tangram-lm"),
        "contract": f"{starter.contract or slot.capitalize()}Contract",
        "arguments": starter.arguments,
        "preset": patch,
        "shared": indent(shared, "  "),
        "metric": starter.metric,
        "variant": starter.variant.replace("USE", module),
        "patch": indent(starter.varied or patch, "      "),
    }
    templates = resources.files("tangram.core") / "templates"
    for file, template in {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}.py": f"{slot}.py",
        f"tests/test_{module}.py": "test.py",
        "study.yaml": "study.yaml",
    }.items():
        text = (templates / f"{template}.txt").read_text(encoding="utf-8")
        yield file, Template(text).substitute(words)

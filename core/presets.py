"""Presets: found by name or path, laid over each other, resolved to an experiment, and written out again."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from attrs import frozen
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from tangram.core.config import (
    DEFAULT,
    ConfigError,
    Node,
    Origin,
    Plain,
    Problem,
    Scalar,
    load,
    merge,
    override,
    show_path,
    suggest,
)
from tangram.core.experiment import Experiment
from tangram.core.plugins import PluginError, Plugins, sha256_of
from tangram.core.provenance import RUN_PRESET, recorded_files
from tangram.core.structuring import UnknownUseError, plain, structure

_COLLECTIONS = ("objectives", "observers")
"""Maps from a name to a component, whose `use` is that name where it is not said."""

_MAX_EXTENDS = 50
"""Presets that one file may name, so that none takes longer to lay over each other than a person waits."""

_WORD = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.-]*")
"""What is safe to write without quotes."""


@frozen
class Resolved:
    """A preset as asked for.

    Attributes:
        experiment: What it resolves to.
        origins: Where each leaf of the experiment was written, by dotted path; `default` if nowhere.
        file: The preset's file.
    """

    experiment: Experiment
    origins: Mapping[str, Origin]
    file: Path

    def blame(self, path: str, text: str) -> Origin:
        """Return where `text`, said of the component at `path`, was written: a leaf that it names, or any below."""
        while path:
            below = {
                leaf: at for leaf, at in self.origins.items() if f"{leaf}.".startswith(f"{path}.") and at != DEFAULT
            }
            named = [at for leaf, at in below.items() if leaf.rpartition(".")[2] in text.split()]
            if below:
                return (named or list(below.values()))[0]
            path = path.rpartition(".")[0]
        return Origin(show_path(self.file))


class ForeignCodeError(ConfigError):
    """A run names files of code that the user has not given."""


def load_preset(name_or_path: str | Path, *overrides: str, plugins: Sequence[str | Path] = ()) -> Experiment:
    """Return the experiment of a preset, with `overrides` such as `model.dim=64` laid over it.

    Args:
        name_or_path: The preset.
        overrides: Changes to it.
        plugins: Plugin files to load first.

    Raises:
        ConfigError: It cannot be resolved; with every problem and its line.
        ForeignCodeError: It is a run's, and needs plugin files that are not in `plugins`.
        PluginError: A plugin that it needs is broken.
    """
    return resolve(name_or_path, overrides, Plugins.discover(plugins)).experiment


def available(plugins: Plugins) -> dict[str, Path]:
    """Return the presets that ship in tree and with plugins, by name."""
    return dict(sorted(plugins.presets.items()))


def resolve(
    name_or_path: str | Path,
    overrides: Sequence[str],
    plugins: Plugins,
    *,
    patches: Sequence[Node] = (),
    folder: Path = Path(),
) -> Resolved:
    """Resolve a preset; single-file plugins that it names join `plugins`.

    Args:
        name_or_path: The preset's name, or its file.
        overrides: Changes such as `model.dim=64`.
        plugins: What exists.
        patches: Laid over the preset in order, before the overrides.
        folder: What a path of the preset, and plugin files in the patches, are relative to.

    Raises:
        ConfigError: With every problem and its line.
        PluginError: A plugin file does not load, or what is named may be in a plugin that did not.
    """
    file = _find(str(name_or_path), plugins, folder, None)
    tree = _name_uses(_compose(file, plugins, ()))
    for patch in patches:
        tree = _lay(tree, _absolute_plugins(patch, folder))
    problems: list[Problem] = []
    for text in overrides:
        try:
            tree = _lay(tree, _absolute_plugins(override(text), Path()))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    _take_plugins(tree, plugins)
    tree = _expand_blocks(tree)
    try:
        experiment = structure(tree, Experiment, plugins.registry)
    except UnknownUseError as error:
        raise _or_broken(error, plugins) from None
    return Resolved(experiment, dict(_origins(tree, plain(experiment), "")), file)


def _find(name: str, plugins: Plugins, folder: Path, origin: Origin | None) -> Path:
    """Return the file of a preset: a path relative to `folder`, or a name."""
    if "/" in name or os.sep in name or name.endswith((".yaml", ".yml")):
        path = folder / Path(name).expanduser()
        if not path.is_file():
            raise ConfigError([Problem(origin, "", f"there is no preset file {show_path(path)}")])
        return path
    path_or_none = plugins.presets.get(name)
    if path_or_none is None:
        hint = suggest(name, available(plugins))
        text = f"there is no preset '{name}'{hint}; a path ends in .yaml or has a /"
        raise _or_broken(ConfigError([Problem(origin, "", text)]), plugins)
    return path_or_none


def _or_broken(error: ConfigError, plugins: Plugins) -> ConfigError | PluginError:
    """Return the error for what is not there, which is another one if a broken plugin may have it."""
    return PluginError(f"{error}\n{plugins.report()}") if plugins.broken else error


# --- composing --------------------------------------------------------------------------------------------


def _compose(file: Path, plugins: Plugins, children: tuple[Path, ...]) -> Node:
    """Read a file and lay it over what it extends; `children` are the files that led here.

    A file that extends nothing may be meant as a patch, so its entries get their `use` only where it is the base.
    """
    tree = _absolute_plugins(load(file), file.parent)
    if RUN_PRESET in {path.name for path in (*children, file)}:
        _demand_files(tree, file, plugins)
    own = dict(cast(Mapping[str, Node], tree.value))
    extends = own.pop("extends", None)
    tree = Node(own, tree.origin)
    base: Node | None = None
    for name, origin in _names(extends):
        parent = _find(name, plugins, file.parent, origin)
        trail = (*children, file)
        if any(parent.samefile(child) for child in trail):
            shown = " -> ".join(show_path(path) for path in (*trail, parent))
            raise ConfigError([Problem(origin, "extends", f"goes in a circle: {shown}")])
        grown = _compose(parent, plugins, trail)
        base = _name_uses(grown) if base is None else _lay(base, grown)
    return tree if base is None else _lay(base, tree)


def _names(extends: Node | None) -> Iterator[tuple[str, Origin]]:
    """Yield what `extends` names: one preset or a list of them."""
    if extends is None or extends.value is None:
        return
    if isinstance(extends.value, list) and len(extends.value) > _MAX_EXTENDS:
        raise ConfigError([Problem(extends.origin, "extends", f"names more than {_MAX_EXTENDS} presets")])
    for node in extends.value if isinstance(extends.value, list) else [extends]:
        if not isinstance(node.value, str):
            raise ConfigError([Problem(node.origin, "extends", "expected the name of a preset, or a list of names")])
        yield node.value, node.origin


def _lay(base: Node, patch: Node) -> Node:
    """Merge; but plugin files add up, for what extends a preset still needs its plugins."""
    merged = _name_uses(merge(base, patch))
    old, new = base.child("plugins"), patch.child("plugins")
    if old is None or new is None or not isinstance(old.value, list) or not isinstance(new.value, list):
        return merged
    both = Node([*old.value, *(node for node in new.value if node not in old.value)], new.origin)
    return _with(merged, "plugins", both)


def _name_uses(tree: Node) -> Node:
    """Say `use` in every entry of a collection, so that a patch which says another replaces the entry."""
    for name in _COLLECTIONS:
        collection = tree.child(name)
        if collection is not None and isinstance(collection.value, dict):
            named = {
                key: _with(node, "use", Node(key, node.origin), over=False) for key, node in collection.value.items()
            }
            tree = _with(tree, name, Node(named, collection.origin))
    return tree


def _with(tree: Node, key: str, node: Node, *, over: bool = True) -> Node:
    """Return `tree`, if it is a map, with `node` under `key`; if not `over`, only where nothing is."""
    if not isinstance(tree.value, dict) or (key in tree.value and not over):
        return tree
    return Node({**tree.value, key: node}, tree.origin)


def _absolute_plugins(tree: Node, folder: Path) -> Node:
    """Make plugin files absolute, so that the resolved preset can be read from anywhere."""
    files = tree.child("plugins")
    if files is None or not isinstance(files.value, list):
        return tree
    absolute = [
        Node(str((folder / node.value).resolve()), node.origin) if isinstance(node.value, str) else node
        for node in files.value
    ]
    return _with(tree, "plugins", Node(absolute, files.origin))


def _plugin_files(tree: Node) -> dict[Path, Origin]:
    """Return the plugin files that a tree names; what is no path is left to structuring."""
    files = tree.child("plugins")
    nodes = files.value if files is not None and isinstance(files.value, list) else []
    return {Path(node.value): node.origin for node in nodes if isinstance(node.value, str)}


def _take_plugins(tree: Node, plugins: Plugins) -> None:
    """Load the plugin files that a preset names."""
    for path, origin in _plugin_files(tree).items():
        if not path.is_file() and path not in plugins.files:
            raise ConfigError([Problem(origin, "plugins", f"there is no plugin file {show_path(path)}")])
        plugins.take_file(path)


def _demand_files(tree: Node, file: Path, plugins: Plugins) -> None:
    """Check that the user gave every plugin file that a run names or says it used.

    Raises:
        ForeignCodeError: With each that is missing.
    """
    used = {Path(path): sha256 for path, sha256 in recorded_files(file.parent).items()}
    named = _plugin_files(tree)
    problems = []
    for path in {**named, **used}:
        if not plugins.stands_for(path, used.get(path)):
            now = sha256_of(path) if path.is_file() else "of a file that is not there"
            before = f", when the run began {used[path]}" if used.get(path, now) != now else ""
            shown = show_path(path)
            text = f"{shown} (sha256 {now}{before}) is code and not imported on a run's word; read it and add --plugin"
            problems.append(Problem(named.get(path, Origin(show_path(file))), "plugins", f"{text} {shown}"))
    if problems:
        raise ForeignCodeError(problems)


def _expand_blocks(tree: Node) -> Node:
    """Lay each group of `model.blocks` over `model.block`."""
    model = tree.child("model")
    block, groups = (model.child("block"), model.child("blocks")) if model else (None, None)
    if model is None or block is None or groups is None or not isinstance(groups.value, list):
        return tree
    expanded = [merge(block, group) if isinstance(group.value, dict) else group for group in groups.value]
    return _with(tree, "model", _with(model, "blocks", Node(expanded, groups.origin)))


# --- writing ----------------------------------------------------------------------------------------------


def dump(experiment: Experiment) -> dict[str, Plain]:
    """Return the experiment as a preset with every default spelled out."""
    tree = cast(dict[str, Any], plain(experiment))
    model = tree["model"]
    return tree | {"model": model | {"blocks": [_patch(model["block"], group) for group in model["blocks"]]}}


def _patch(base: Plain, value: Plain) -> Plain:
    """Return what makes `value` when laid over `base`: an entry of a map that `value` lacks is null."""
    if not isinstance(base, dict) or not isinstance(value, dict) or base.get("use") != value.get("use"):
        return value
    removed: dict[str, Plain] = {key: None for key in base if key not in value}
    return {key: _patch(base.get(key), item) for key, item in value.items()} | removed


def to_yaml(experiment: Experiment) -> str:
    """Return `dump` as YAML for people: large round numbers as integers, flat lists on one line."""
    yaml = YAML()
    yaml.width = 120
    yaml.representer.ignore_aliases = lambda _: True
    text = io.StringIO()
    yaml.dump(_readable(dump(experiment)), text)
    return text.getvalue()


def _readable(value: Plain) -> object:
    if isinstance(value, dict):
        return CommentedMap({_readable(key): _readable(item) for key, item in value.items()})
    if isinstance(value, list):
        items = CommentedSeq([_readable(item) for item in value])
        if not any(isinstance(item, dict | list) for item in value):
            items.fa.set_flow_style()
        for item in items:
            if isinstance(item, CommentedMap) and not any(isinstance(v, dict | list) for v in item.values()):
                item.fa.set_flow_style()
        return items
    if isinstance(value, float) and value.is_integer() and 1000 <= abs(value) < 2**53:
        return int(value)
    if isinstance(value, str) and not _WORD.fullmatch(value):
        return DoubleQuotedScalarString(value)  # the only style that keeps every character everywhere
    return value


def digest(experiment: Experiment) -> str:
    """Return 8 hexadecimal digits that name the experiment: of the SHA-256 of its values as canonical JSON."""
    return _digest(plain(experiment))


def digest_anywhere(experiment: Experiment) -> str:
    """Return the digest without where the work runs: that of runs which may go on from each other's checkpoints."""
    tree = cast(dict[str, Plain], plain(experiment))
    return _digest({name: value for name, value in tree.items() if name != "parallel"})


def _digest(value: Plain) -> str:
    canonical = _one_spelling(value)
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _one_spelling(value: Plain) -> Plain:
    """Write a whole float as an integer, so that equal experiments have one digest, and leave out what is null.

    So a setting that a later version adds, and that may be null, changes the digest of no run from before.
    """
    if isinstance(value, dict):
        return {key: _one_spelling(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_one_spelling(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def flatten(experiment: Experiment) -> dict[str, Scalar]:
    """Return all values by dotted path, elements of lists by index."""
    return {".".join(path): value for path, value in _leaves(plain(experiment), ())}


def difference(a: Experiment, b: Experiment) -> dict[str, tuple[Scalar, Scalar]]:
    """Return the leaves that differ, as they are in `a` and in `b`; None where one has no such leaf."""
    left, right = flatten(a), flatten(b)
    paths = [*left, *(path for path in right if path not in left)]
    return {
        path: (left.get(path), right.get(path))
        for path in paths
        if path not in left or path not in right or left[path] != right[path]
    }


def _leaves(value: Plain, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Scalar]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, str(i)))
    else:
        yield path, value


def _origins(node: Node | None, value: Plain, path: str) -> Iterator[tuple[str, Origin]]:
    """Yield where each leaf was written. A null that gave way to a default was not its origin."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for step, item in items:
            yield from _origins(node and node.child(step), item, f"{path}.{step}" if path else str(step))
    else:
        defaulted = node is None or (node.value is None and value is not None)
        yield path, DEFAULT if node is None or defaulted else node.origin

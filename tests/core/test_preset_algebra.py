"""Laws of layers: what laying presets and overrides over each other promises, on compositions of what ships."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import attrs
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from tangram.core import presets as language
from tangram.core.config import DEFAULT, Origin
from tangram.core.experiment import Experiment
from tangram.core.plugins import Plugins
from tangram.core.presets import Resolved, difference, digest, dump, flatten, resolve, to_yaml
from tangram.core.structuring import plain
from tangram.testing import presets

PLUGINS = Plugins.discover()


@pytest.fixture(scope="module", autouse=True)
def files_that_ship_are_read_once() -> Iterator[None]:
    """Reading YAML takes nine tenths of resolving, and these files stay as they are."""
    shipped, read = set(PLUGINS.presets.values()), language.load
    kept = cache(read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "load", lambda path: (kept if path in shipped else read)(path))
        yield


def of(name: str | Path, *overrides: str) -> Resolved:
    return resolve(name, overrides, PLUGINS)


def same(a: Experiment, b: Experiment) -> bool:
    assert (a == b) == (digest(a) == digest(b))
    return a == b


def path_of(override: str) -> str:
    return override.partition("=")[0]


def value_at(tree: object, path: str) -> object:
    for step in path.split("."):
        tree = tree[int(step)] if isinstance(tree, list) else tree[step]
    return tree


def as_map(override: str) -> dict[str, object]:
    """Return an override as the map that a file would say."""
    path, _, value = override.partition("=")
    tree = json.loads(value)
    for step in reversed(path.split(".")):
        tree = {step: tree}
    return tree


def chain(folder: Path, base: str | None, *layers: Mapping[str, object]) -> Path:
    """Write each layer to a file that extends the one before; return the last one."""
    for i, layer in enumerate(layers):
        below = {"extends": base} if base else {}
        (folder / f"{i}.yaml").write_text(json.dumps(below | dict(layer)))
        base = f"./{i}.yaml"
    return folder / f"{len(layers) - 1}.yaml"


def maps_of(tree: object, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the dotted path of every map that a preset may patch with a map."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if path == ("model", "blocks") else ()
    if path and isinstance(tree, dict):
        yield ".".join(path)
    for key, item in items:
        if isinstance(item, dict) or (*path, key) == ("model", "blocks"):
            yield from maps_of(item, (*path, str(key)))


# --- layers -----------------------------------------------------------------------------------------------


@given(presets(), st.data())
def test_an_empty_layer_changes_neither_a_value_nor_an_origin(drawn, data):
    whole = of(*drawn)
    paths = data.draw(st.lists(st.sampled_from(sorted(maps_of(dump(whole.experiment)))), max_size=5))
    again = of(*drawn, *(f"{path}={{}}" for path in paths))
    assert same(again.experiment, whole.experiment)
    with tempfile.TemporaryDirectory() as folder:
        layered = of(chain(Path(folder), drawn[0], {}, {"model": {}}), *drawn[1:])
    assert same(layered.experiment, whole.experiment)
    assert layered.origins == whole.origins


@given(presets())
def test_an_override_laid_twice_is_laid_once(drawn):
    name, *overrides = drawn
    once = of(*drawn).experiment
    assert same(of(name, *(text for text in overrides for _ in range(2))).experiment, once)
    assert same(of(name, *overrides, *overrides).experiment, once)


@given(presets(), st.randoms(use_true_random=False))
def test_overrides_that_do_not_meet_say_the_same_in_any_order(drawn, shuffler):
    name, *overrides = drawn
    shuffled = shuffler.sample(overrides, len(overrides))
    assert same(of(name, *shuffled).experiment, of(*drawn).experiment)


@given(presets())
def test_the_later_of_two_overrides_of_one_path_wins(drawn):
    name, *overrides = drawn
    before = of(name)
    tree = dump(before.experiment)
    back = [f"{path}={json.dumps(value_at(tree, path))}" for path in map(path_of, overrides)]
    assert same(of(name, *overrides, *back).experiment, before.experiment)
    assert same(of(name, *back, *overrides).experiment, of(*drawn).experiment)


@given(presets())
def test_a_layer_of_a_file_is_an_override_and_a_list_is_a_chain(drawn):
    name, *overrides = drawn
    layers = [as_map(text) for text in overrides]
    expected = of(*drawn).experiment
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in_turn").mkdir()
        assert same(of(chain(Path(folder) / "in_turn", name, {}, *layers)).experiment, expected)
        for i, layer in enumerate(layers):
            (Path(folder) / f"patch{i}.yaml").write_text(json.dumps(layer))
        listed = chain(Path(folder), None, {"extends": [name, *(f"./patch{i}.yaml" for i in range(len(layers)))]})
        assert same(of(listed).experiment, expected)


def test_a_patch_in_a_list_reaches_an_entry_under_another_name_than_its_use(tmp_path):
    (tmp_path / "base.yaml").write_text(toys.PRESET.replace("guess: {}", "{far: {use: balance, share: 0.75}}"))
    patch = {"objectives": {"far": {"weight": 3.0}, "balance": {}}}
    (tmp_path / "patch.yaml").write_text(json.dumps(patch))
    (tmp_path / "list.yaml").write_text("extends: [./base.yaml, ./patch.yaml]\n")
    listed = resolve(tmp_path / "list.yaml", (), toys.plugins()).experiment.objectives
    assert listed == resolve(chain(tmp_path, "./base.yaml", patch), (), toys.plugins()).experiment.objectives
    assert (listed["far"].share, listed["balance"]) == (0.75, toys.Balance())


# --- swaps ------------------------------------------------------------------------------------------------


def slots_of(tree: object, path: str = "") -> Iterator[tuple[str, dict[str, object]]]:
    """Yield every component of a dump with its path."""
    if isinstance(tree, dict) and "use" in tree:
        yield path, tree
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in entries:
        yield from slots_of(item, f"{path}.{key}".lstrip("."))


SHIPPED = {name: dict(slots_of(dump(of(name).experiment))) for name in sorted(PLUGINS.presets)}
SHOWN = {part["use"]: part for parts in SHIPPED.values() for part in parts.values()} | {"tokens": {"folder": "x"}}
"""A component of each name that has settings without a default."""


def inherited(path: str) -> str:
    """Return the path that a group of blocks has from `model.block`; other paths as they are."""
    return re.sub(r"^model\.blocks\.[0-9]+\.", "model.block.", path)


SWAPS = [
    (path, entry.mark.use)
    for path, part in SHIPPED["v3-tiny"].items()
    for entry in PLUGINS.registry
    if {"objectives": "objective", "observers": "observer"}.get(path.split(".")[0], path.split(".")[-1])
    == entry.mark.slot
    # What a group shares with the block it also shares the settings of.
    and entry.mark.use not in {part["use"], SHIPPED["v3-tiny"].get(inherited(path), {}).get("use")}
]


def below(origins: Mapping[str, Origin], path: str) -> dict[str, Origin]:
    return {leaf: at for leaf, at in origins.items() if f"{leaf}.".startswith(f"{path}.")}


@pytest.mark.parametrize(("path", "use"), SWAPS)
def test_a_swap_leaves_nothing_of_the_old_component_behind(path, use):
    """Said is no more of the new component than must be: all else stands at its default."""
    config = next(entry.config for entry in PLUGINS.registry if entry.mark.use == use)
    fields = {field.alias: field for field in attrs.fields(config) if field.init}
    said = {"use": use, **{k: SHOWN[use][k] for k, field in fields.items() if field.default is attrs.NOTHING}}
    text = f"{path}={json.dumps(said)}"
    resolved = of("v3-tiny", text)
    found = value_at(dump(resolved.experiment), path)
    assert list(found) == ["use", *fields]
    for key, value in found.items():
        origins = {at.file for at in below(resolved.origins, f"{path}.{key}").values()}
        assert origins <= {text if key in said else DEFAULT.file}
        if key in said:
            assert value == said[key]
        else:
            default = fields[key].default
            assert value == plain(default.factory() if hasattr(default, "factory") else default)


# --- writing ----------------------------------------------------------------------------------------------


@given(presets())
def test_what_is_shown_of_a_composition_is_the_same_composition(drawn):
    experiment = of(*drawn).experiment
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "shown.yaml").write_text(to_yaml(experiment), encoding="utf-8")
        again = of(Path(folder) / "shown.yaml").experiment
    assert same(again, experiment)
    assert to_yaml(again) == to_yaml(experiment)


def test_a_group_of_blocks_that_drops_an_entry_of_a_map_is_shown_so(tmp_path):
    names = "model.block.feedforward.names={a: 1, b: 2}"
    dropped = toys.resolved(tmp_path, names, "model.blocks.1.feedforward.names={a: null, c: 3}").experiment
    assert dropped.model.blocks[1].feedforward.names == {"b": 2, "c": 3}
    again = toys.resolved(tmp_path, text=to_yaml(dropped)).experiment
    assert same(again, dropped)
    assert difference(again, dropped) == {}


# --- differences and origins ------------------------------------------------------------------------------


@given(presets(), presets())
def test_a_difference_laid_over_the_one_gives_the_other(one, other):
    a, b = of(*one).experiment, of(*other).experiment
    told, left, right = difference(a, b), flatten(a), flatten(b)
    assert {path: told[path][1] if path in told else left[path] for path in right} == right
    assert left.keys() - told.keys() == left.keys() & right.keys() - told.keys()
    assert (told == {}) == same(a, b)


def reached(leaf: str, override: str) -> bool:
    return f"{leaf}.".startswith(f"{path_of(override)}.")


@given(presets())
def test_an_override_changes_what_it_names_and_nothing_else(drawn):
    name, *overrides = drawn
    for leaf in difference(of(name).experiment, of(*drawn).experiment):
        assert any(reached(leaf, text) or reached(inherited(leaf), text) for text in overrides)


@given(presets(), st.booleans())
def test_the_origin_of_a_leaf_is_the_layer_that_wrote_it_last(drawn, in_files):
    name, *overrides = drawn
    before = of(name).origins
    with tempfile.TemporaryDirectory() as folder:
        layers = [as_map(text) for text in overrides]
        after = of(chain(Path(folder), name, {}, *layers) if in_files else name, *([] if in_files else overrides))
    names = [f"{folder}/{i + 1}.yaml" for i in range(len(overrides))] if in_files else overrides
    for leaf, at in after.origins.items():
        wrote = [layer for layer, text in zip(names, overrides, strict=True) if reached(leaf, text)]
        passed_on = [layer for layer, text in zip(names, overrides, strict=True) if reached(inherited(leaf), text)]
        if wrote:
            assert [at.file] == wrote
        elif passed_on:  # unless the group says it itself
            assert at.file in passed_on or at == before[leaf]
        else:
            assert at == before[leaf]
        assert after.blame(leaf, "is wrong") == at or at == DEFAULT


@given(presets(), st.data())
def test_blame_names_a_layer_that_wrote_of_the_component(drawn, data):
    resolved = of(*drawn)
    leaf = data.draw(st.sampled_from(sorted(leaf for leaf in resolved.origins if "." in leaf)))
    component, _, name = leaf.rpartition(".")
    near = {at for at in below(resolved.origins, component).values() if at != DEFAULT}
    at = resolved.blame(component, f"its {name} is wrong")
    assert at != DEFAULT
    if resolved.origins[leaf] != DEFAULT:
        assert at in {o for path, o in below(resolved.origins, component).items() if path.endswith(f".{name}")}
    elif near:
        assert at in near

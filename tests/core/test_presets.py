"""A preset resolves to one experiment, every leaf has an origin, and its dump is the same preset."""

import itertools
import random
import re
import tempfile
from functools import partial
from pathlib import Path

import attrs
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.config import ConfigError
from tangram.core.curve import Curve
from tangram.core.experiment import BlockConfig, BlockGroup, Experiment
from tangram.core.plugins import Broken, PluginError, Plugins
from tangram.core.presets import (
    available,
    difference,
    digest,
    dump,
    flatten,
    load_preset,
    resolve,
    to_yaml,
)
from tangram.core.registry import mark_of
from tangram.testing.strategies import curves


@pytest.fixture
def preset(tmp_path):
    return partial(toys.resolved, tmp_path)


# --- what a preset says ---


def test_a_preset_becomes_the_experiment_it_describes(preset):
    experiment = preset().experiment
    assert experiment.train.tokens == 14_800_000_000_000
    assert isinstance(experiment.train.tokens, int)
    assert experiment.model.block.attention == toys.Wide(n_heads=2)
    assert [group.repeat for group in experiment.model.blocks] == [1, 3]
    assert experiment.objectives == {"guess": toys.Guess()}
    assert experiment.train.batch_sequences == Curve.constant(4)
    assert isinstance(experiment.model.blocks, tuple)


def test_each_group_of_blocks_is_a_patch_on_the_block(preset):
    first, second = preset("model.blocks.1.feedforward.router.top_k=3").experiment.model.blocks
    assert first.feedforward == toys.Dense()
    assert second.feedforward.router == toys.TopK(top_k=3)
    assert first.attention == second.attention == toys.Wide(n_heads=2)


def test_an_override_of_the_block_reaches_every_group(preset):
    model = preset("model.block.attention.n_heads=8").experiment.model
    assert {block.attention.n_heads for block in model.layers()} == {8}


def test_another_use_replaces_the_component_and_keeps_nothing_of_the_old(preset):
    experiment = preset("model.block.attention={use: narrow, window: 9}").experiment
    assert {block.attention for block in experiment.model.layers()} == {toys.Narrow(window=9)}
    assert preset("objectives.guess.use=balance").experiment.objectives["guess"] == toys.Balance()


def test_an_entry_of_a_collection_is_used_under_its_own_name_or_another(preset):
    experiment = preset("objectives.second={use: balance, share: 0.25}", "objectives.balance={}").experiment
    assert experiment.objectives["second"] == toys.Balance(share=0.25)
    assert experiment.objectives["balance"] == toys.Balance()


def test_a_later_patch_of_a_renamed_entry_keeps_its_use(preset):
    experiment = preset("objectives.x={use: balance}", "objectives.x.share=0.75").experiment
    assert experiment.objectives["x"] == toys.Balance(share=0.75)


def test_null_removes_an_entry_and_a_key_and_is_none_where_none_may_be(preset):
    assert preset("observers.blind=null").experiment.observers == {}
    assert preset("observers.unseen=null").experiment.observers == preset().experiment.observers
    assert preset("model.block.feedforward.balancer=null").experiment.model.block.feedforward.balancer is None
    assert preset("model.block.attention.scale=null").experiment.model.block.attention.scale == 1.0
    assert preset("model.block.attention.rank=null").experiment.model.block.attention.rank is None


def test_unrelated_overrides_commute(preset):
    overrides = [
        "model.dim=8",
        "train.lr=[{until: 5, value: 1}, {value: 0}]",
        "model.blocks.0.repeat=2",
        "model.blocks.1.attention.n_heads=4",
        "objectives.extra={use: balance}",
        "optimizer.decay=1",
    ]
    expected = preset(*overrides).experiment
    for seed in range(5):
        random.Random(seed).shuffle(overrides)
        assert preset(*overrides).experiment == expected


# --- extending ---


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_preset_extends_others_and_the_later_wins(tmp_path):
    write(
        tmp_path,
        base=toys.PRESET,
        a="model: {dim: 1, vocab_size: 1}",
        b="model: {dim: 2}\nmodel_is: null",
        child="extends: [./base.yaml, ./a.yaml, ./b.yaml]\nname: child\ntrain: {seed: 5}",
    )
    with pytest.raises(ConfigError, match=r"b\.yaml:2: model_is: unknown key"):
        resolve(tmp_path / "child.yaml", (), toys.plugins())
    write(tmp_path, b="model: {dim: 2}")
    resolved = resolve(tmp_path / "child.yaml", (), toys.plugins())
    model = resolved.experiment.model
    assert (resolved.experiment.name, model.dim, model.vocab_size) == ("child", 2, 1)
    assert resolved.experiment.train.seed == 5
    assert str(resolved.origins["model.dim"]) == f"{tmp_path}/b.yaml:1"
    assert str(resolved.origins["model.vocab_size"]) == f"{tmp_path}/a.yaml:1"
    assert str(resolved.origins["train.seed"]) == f"{tmp_path}/child.yaml:3"


def test_a_preset_extends_by_name_what_ships(tmp_path):
    write(tmp_path, shipped=toys.PRESET, child="extends: shipped\nname: child")
    plugins = toys.plugins()
    plugins.presets["shipped"] = tmp_path / "shipped.yaml"
    assert resolve(tmp_path / "child.yaml", (), plugins).experiment.name == "child"
    assert resolve("shipped", (), plugins).experiment.name == "toy"
    assert available(plugins) == {"shipped": tmp_path / "shipped.yaml"}


def test_a_diamond_of_presets_is_no_circle_but_a_circle_is_refused(tmp_path):
    write(
        tmp_path,
        base=toys.PRESET,
        left="extends: ./base.yaml",
        right="extends: ./base.yaml",
        top="extends: [./left.yaml, ./right.yaml]",
        one="name: one\nextends: ./two.yaml",
        two="extends: ./one.yaml",
    )
    resolve(tmp_path / "top.yaml", (), toys.plugins())
    with pytest.raises(ConfigError, match=r"two\.yaml:1: extends: goes in a circle: .*one.* -> .*two.* -> .*one"):
        resolve(tmp_path / "one.yaml", (), toys.plugins())


def test_a_preset_that_is_not_there_is_named_with_a_close_match(tmp_path):
    plugins = toys.plugins()
    plugins.presets["v3-tiny"] = tmp_path / "v3-tiny.yaml"
    with pytest.raises(ConfigError, match=r"no preset 'v3-tinny', did you mean 'v3-tiny'\?"):
        resolve("v3-tinny", (), plugins)
    with pytest.raises(ConfigError, match="no preset file"):
        resolve(tmp_path / "none.yaml", (), plugins)
    write(tmp_path, child="name: x\nextends: v3-tinny", odd="extends: [3]")
    with pytest.raises(ConfigError, match=r"child\.yaml:2: .*did you mean 'v3-tiny'"):
        resolve(tmp_path / "child.yaml", (), plugins)
    with pytest.raises(ConfigError, match=r"odd\.yaml:1: extends: expected the name"):
        resolve(tmp_path / "odd.yaml", (), plugins)


def test_a_name_that_a_broken_plugin_may_have_is_another_error(tmp_path):
    write(tmp_path, toy=toys.PRESET)
    plugins = toys.plugins()
    plugins.broken.append(Broken("acme", "acme-tangram 0.3", "ImportError: no acme"))
    resolve(tmp_path / "toy.yaml", (), plugins)
    with pytest.raises(ConfigError):
        resolve(tmp_path / "toy.yaml", ["model.dim=x"], plugins)
    with pytest.raises(PluginError) as caught:
        resolve(tmp_path / "toy.yaml", ["model.block.attention.use=window"], plugins)
    assert "there is no attention 'window'" in str(caught.value)
    assert "acme (acme-tangram 0.3) failed to load: ImportError: no acme" in str(caught.value)
    with pytest.raises(PluginError, match="no preset 'acme-tiny'"):
        resolve("acme-tiny", (), plugins)


# --- plugin files ---

PLUGIN = """\
from attrs import frozen
from tangram.core.registry import component

@component("attention", use="from_{name}")
@frozen(kw_only=True)
class Config:
    width: int = 1

    def build(self, ctx): ...
"""


def test_a_preset_loads_its_plugin_files_relative_to_itself(tmp_path, monkeypatch):
    folder = tmp_path / "below"
    folder.mkdir()
    write(
        tmp_path,
        child="extends: below/base.yaml\nplugins: [two.py]\nmodel: {block: {attention: {use: from_two}}}",
    )
    write(folder, base="plugins: [one.py]\n" + toys.PRESET.replace("wide, n_heads: 2", "from_one, width: 3"))
    (folder / "one.py").write_text(PLUGIN.format(name="one"))
    (tmp_path / "two.py").write_text(PLUGIN.format(name="two"))
    monkeypatch.chdir("/")
    plugins = toys.plugins()
    base = resolve(folder / "base.yaml", (), plugins).experiment
    child = resolve(tmp_path / "child.yaml", (), plugins).experiment
    assert base.model.block.attention.width == 3
    assert mark_of(type(child.model.block.attention)).use == "from_two"
    assert child.plugins == (str(folder / "one.py"), str(tmp_path / "two.py"))
    assert plugins.registry.get("attention", "from_one").origin.endswith("below/one.py")

    (tmp_path / "elsewhere.yaml").write_text(to_yaml(child))
    assert resolve(tmp_path / "elsewhere.yaml", (), toys.plugins()).experiment == child


def test_a_plugin_file_that_is_not_there_or_broken_is_named(tmp_path):
    write(tmp_path, toy=toys.PRESET + "plugins: [none.py]\n", odd=toys.PRESET + "plugins: [3]\n")
    with pytest.raises(ConfigError, match=r"toy\.yaml:\d+: plugins: there is no plugin file .*none\.py"):
        resolve(tmp_path / "toy.yaml", (), toys.plugins())
    with pytest.raises(ConfigError, match=r"odd\.yaml:\d+: plugins\.0: expected a string, got 3"):
        resolve(tmp_path / "odd.yaml", (), toys.plugins())
    (tmp_path / "none.py").write_text("import no_such_module_anywhere")
    with pytest.raises(PluginError, match=r"none\.py.*ModuleNotFoundError"):
        resolve(tmp_path / "toy.yaml", (), toys.plugins())


# --- writing ---


def resolve_text(text: str) -> Experiment:
    with tempfile.TemporaryDirectory() as folder:
        return toys.resolved(Path(folder), text=text).experiment


TOY = resolve_text(toys.PRESET)


@st.composite
def experiments(draw: st.DrawFn) -> Experiment:
    """The toy experiment with other blocks, objectives, data, texts and curves."""
    parts = {"attention": toys.attentions, "feedforward": toys.feedforwards}
    groups = st.builds(BlockGroup, repeat=st.integers(1, 99), **parts)
    model = attrs.evolve(
        TOY.model,
        block=draw(st.builds(BlockConfig, **parts)),
        blocks=tuple(draw(st.lists(groups, min_size=1, max_size=3))),
    )
    train = attrs.evolve(TOY.train, lr=draw(curves()), tokens=draw(toys.counts), prompt=draw(toys.words))
    return attrs.evolve(
        TOY,
        name=draw(toys.words),
        model=model,
        train=train,
        objectives=draw(toys.objectives),
        data=draw(toys.rows),
    )


@given(experiments())
def test_a_dumped_experiment_is_itself_a_preset(experiment):
    again = resolve_text(to_yaml(experiment))
    assert again == experiment
    assert to_yaml(again) == to_yaml(experiment)
    assert digest(again) == digest(experiment)


def test_every_pair_of_marks_survives_in_a_list_and_as_a_key():
    pairs = tuple("".join(pair) for pair in itertools.product("?@-:#&*!|>%'\"[]{}, a0~<=\\", repeat=2))
    collection = {pair: toys.Guess() for pair in pairs}
    experiment = attrs.evolve(TOY, data=toys.Rows(files=pairs), objectives=collection)
    assert resolve_text(to_yaml(experiment)) == experiment


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (0.0, -0.0), (2**60, 2.0**60)])
def test_equal_numbers_have_one_digest(one, other):
    a, b = (attrs.evolve(TOY, optimizer=toys.Still(decay=decay)) for decay in (one, other))
    assert a == b
    assert digest(a) == digest(b)


@given(experiments())
def test_a_dump_is_plain_and_names_every_field(experiment):
    def check(config: object, dumped: object) -> None:
        if attrs.has(type(config)) and not isinstance(config, Curve):
            extra = {"use"} if mark_of(type(config)) else set()
            assert set(dumped) == {field.name for field in attrs.fields(type(config))} | extra
            for field in attrs.fields(type(config)):
                check(getattr(config, field.name), dumped[field.name])
        assert type(dumped) in (dict, list, str, int, float, bool, type(None))

    check(experiment, dump(experiment))


@given(experiments(), experiments())
def test_equal_experiments_share_a_digest_and_others_differ_where_it_is_told(a, b):
    assert (digest(a) == digest(b)) == (a == b) == (difference(a, b) == {})
    assert re.fullmatch("[0-9a-f]{8}", digest(a))
    left, right = flatten(a), flatten(b)
    for path, (old, new) in difference(a, b).items():
        assert (left.get(path), right.get(path)) == (old, new)
    assert difference(b, a).keys() == difference(a, b).keys()


def test_the_order_of_a_collection_does_not_enter_the_digest(preset):
    one = preset("objectives.a={use: guess}", "objectives.b={use: guess}").experiment
    other = preset("objectives.b={use: guess}", "objectives.a={use: guess}").experiment
    assert list(one.objectives) != list(other.objectives)
    assert one == other
    assert digest(one) == digest(other)


def test_a_difference_names_the_leaf_and_both_values(preset):
    other = preset("model.dim=8", "observers.second={use: blind}").experiment
    assert difference(TOY, other) == {
        "model.dim": (16, 8),
        "observers.second.use": (None, "blind"),
        "observers.second.every": (None, 1),
    }
    assert flatten(TOY)["model.block.feedforward.balancer.speed.0.until"] == 14_300_000_000_000


def test_yaml_is_written_for_people():
    text = to_yaml(TOY)
    assert "tokens: 14800000000000\n" in text
    assert "- {until: 14300000000000, value: 0.001}\n" in text
    assert "betas: [0.9, 0.95]\n" in text
    assert "!" not in text
    assert "&" not in text


def test_every_leaf_has_an_origin(preset, tmp_path):
    resolved = preset("model.dim=8", "train.clip=null", "objectives.balance={}")
    where = {path: str(origin) for path, origin in resolved.origins.items()}
    assert where.keys() == flatten(resolved.experiment).keys()
    assert resolved.file == tmp_path / "toy.yaml"
    assert where["model.dim"] == "model.dim=8"
    assert where["name"] == f"{tmp_path}/toy.yaml:1"
    assert where["model.block.attention.n_heads"] == f"{tmp_path}/toy.yaml:{toys.line_of('n_heads')}"
    assert where["model.blocks.1.attention.n_heads"] == where["model.block.attention.n_heads"]
    assert where["model.blocks.0.feedforward.use"] == f"{tmp_path}/toy.yaml:{toys.line_of('{use: dense}')}"
    assert where["model.block.attention.scale"] == where["train.clip"] == "default"
    assert where["objectives.balance.use"] == "objectives.balance={}"
    assert where["train.lr.1.value"] == f"{tmp_path}/toy.yaml:{toys.line_of('lr:')}"


# --- what ships ---

SHIPPED = sorted(Plugins.discover().presets)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_preset_resolves_and_its_dump_is_the_same_preset(name, tmp_path):
    experiment = load_preset(name)
    (tmp_path / "again.yaml").write_text(to_yaml(experiment))
    again = load_preset(tmp_path / "again.yaml")
    assert again == experiment
    assert digest(again) == digest(experiment)
    assert experiment.name == name

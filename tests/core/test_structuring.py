"""Structuring is strict, tells every mistake at once with its line, and reads back what `plain` writes."""

import json
from functools import partial

import attrs
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.config import ConfigError, read
from tangram.core.contracts import SLOTS
from tangram.core.registry import Registry, mark_of
from tangram.core.structuring import plain, structure
from tangram.testing.strategies import configs

COMPONENTS = [cls for cls in vars(toys).values() if isinstance(cls, type) and mark_of(cls)]


@pytest.fixture
def preset(tmp_path):
    return partial(toys.resolved, tmp_path)


def refused(preset, *overrides: str, replace: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        preset(*overrides, replace=replace)
    return str(caught.value).splitlines()


MISTAKES = {
    "model.dim=2.7": "model.dim: expected an integer, got 2.7",
    "model.dim='3'": "model.dim: expected an integer, got '3'",
    "model.dim=true": "model.dim: expected an integer, got true",
    "model.dim=[1]": "model.dim: expected an integer, got a list",
    "model.dim=1e30": "model.dim: expected an integer, got 1e+30",
    "model.dim=-3": "model.dim: must be > 0, got -3",
    "model.norm_eps='1'": "model.norm_eps: expected a number, got '1'",
    "model.norm_eps=false": "model.norm_eps: expected a number, got false",
    "model.recompute=selectiv": "model.recompute: must be one of 'none', 'selective', 'full', got 'selectiv'",
    "model.blocks=[]": "model.blocks: must have a length >= 1, got 0",
    "model.blocks=3": "model.blocks: expected a list, got 3",
    "model.blocks=[3]": "model.blocks.0: expected a map, got 3",
    "name=3": "name: expected a string, got 3",
    "name=null": "name: is null and has no default",
    "data.shuffle=1": "data.shuffle: expected true or false, got 1",
    "data.files=abc": "data.files: expected a list, got 'abc'",
    "data.files=[]": "data.files: must have a length >= 1, got 0",
    "data.files=[a, 1]": "data.files.1: expected a string, got 1",
    "model.block.attention.betas=[0.9]": "model.block.attention.betas: expected a list of 2, got one of 1",
    "model.block.attention.mode=fancyy": "'plain', 'fancy', got 'fancyy', did you mean 'fancy'?",
    "model.block.attention.n_head=3": "model.block.attention.n_head: unknown key, did you mean 'n_heads'?",
    "model.block.attention.use=wode": "no attention 'wode', did you mean 'wide'? (known: narrow, wide)",
    "model.block.attention.use=3": "model.block.attention.use: there is no attention 3 (known: narrow, wide)",
    "model.block.attention=wide": "expected a map such as {use: narrow}; got 'wide' (known: narrow, wide)",
    "model.block.feedforward.router={use: dense}": "there is no router 'dense' (known: toy_top)",
    "model.block.feedforward.router.top_k=9": "feedforward: router.top_k=9 is more than n_experts=4",
    "model.block.feedforward.names={a: x}": "model.block.feedforward.names.a: expected an integer, got 'x'",
    "objectives.gess={}": "objectives.gess.use: there is no objective 'gess', did you mean 'guess'?",
    "objectives=3": "objectives: expected a map, got 3",
    "observers.blind=3": "observers.blind: expected a map such as {use: blind}; got 3",
    "train.lr.0.from=x": "train.lr.0.from: expected a number, got 'x'",
    "train.lr=[{value: 1, until: 2}]": "train.lr.0: the last piece must not end",
    "trian.tokens=3": "trian: unknown key, did you mean 'train'?",
    "precision=null": "precision: is null and has no default",
    "extends=toy": "extends: unknown key",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_told_in_words_with_its_path_and_its_override(override, preset):
    lines = refused(preset, override)
    assert len(lines) == 1
    assert lines[0].startswith(f"{override}: ")
    assert MISTAKES[override] in lines[0]


def test_a_mistake_in_a_file_is_told_with_its_line(preset, tmp_path):
    said = refused(preset, replace={"dim: 16": "dimm: 16", "sequence_length: 8": "sequence_length: x"})
    file = f"{tmp_path}/toy.yaml"
    assert said == [
        f"{file}:{toys.line_of('model:')}: model.dim: is missing",
        f"{file}:{toys.line_of('dim: 16')}: model.dimm: unknown key, did you mean 'dim'?",
        f"{file}:{toys.line_of('sequence_length')}: train.sequence_length: expected an integer, got 'x'",
    ]


def test_mistakes_of_every_ring_are_told_together(preset):
    overrides = [
        "model.dim=-1",
        "model.vocab_size=0",
        "model.blocks.1.feedforward.router.top_k=9",
        "train.tokns=3",
        "train.lr=x",
        "guard.use=tioy",
    ]
    said = refused(preset, *overrides)
    assert len(said) == len(overrides)
    assert all(any(line.startswith(f"{text}: ") for line in said) for text in overrides)


def test_one_mistake_that_many_blocks_inherit_is_told_once(preset):
    said = refused(preset, replace={"n_heads: 2": "n_heads: 0", "n_experts: 4": "n_expert: 4"})
    assert [line.split(": ", 1)[1] for line in said] == [
        "model.block.attention.n_heads: must be > 0, got 0",
        "model.block.feedforward.n_experts: is missing",
        "model.block.feedforward.n_expert: unknown key, did you mean 'n_experts'?",
    ]


def test_the_same_mistake_in_two_places_of_one_line_is_told_twice(preset):
    said = refused(preset, "train={tokens: x, seed: x, sequence_length: 8, batch_sequences: 1, lr: 0}")
    assert len(said) == 2


def test_all_malformed_overrides_are_told_together(preset):
    assert len(refused(preset, "model.dim", "x=[", "model.blocks.7.repeat=1")) == 3


@pytest.mark.parametrize("config", COMPONENTS)
@given(data=st.data())
def test_every_component_alone_reads_back_what_it_writes(config, data):
    drawn = data.draw(toys.attentions | toys.feedforwards) if config is toys.Sparse else data.draw(configs(config))
    slot = mark_of(type(drawn)).slot
    again = structure(read(json.dumps(plain(drawn), ensure_ascii=False), "x"), SLOTS[slot], toys.plugins().registry)
    assert again == drawn
    assert type(again) is type(drawn)


def test_a_component_that_yaml_cannot_hold_is_told_in_words():
    @attrs.frozen
    class Odd:
        what: complex | bytes

    @attrs.frozen
    class Rude:
        n: int = 0

        def __attrs_post_init__(self) -> None:
            1 / self.n

    with pytest.raises(ConfigError, match="presets cannot hold"):
        structure(read("{what: 3}", "x"), Odd, Registry())
    with pytest.raises(ConfigError, match="x:1: ZeroDivisionError: division by zero"):
        structure(read("{n: 0}", "x"), Rude, Registry())

"""The study file: what it comes to, and what it says to a person who wrote it wrong."""

from pathlib import Path

import pytest
from toy_study import STUDY, study

from tangram.core.config import ConfigError
from tangram.core.plugins import PluginError
from tangram.core.study import BASE

AXES = "axes:\n  feedforward:\n    wide: {model: {block: {feedforward: {hidden: 16}}}}\n"
PATCH = "{model: {block: {feedforward: {hidden: 16}}}}"
TWO = """\
axes:
  width:
    wide: {model: {block: {feedforward: {hidden: 16}}}}
    wider: {model: {block: {feedforward: {hidden: 32}}}}
  heads:
    many: {model: {block: {attention: {n_heads: 4}}}}
"""


def names(found: object) -> list[str]:
    return [variant.name for variant in found.variants]


def line_of(part: str, text: str = STUDY) -> int:
    return text[: text.index(part)].count("\n") + 1


def test_the_base_is_always_a_variant_and_comes_first(tmp_path: Path) -> None:
    found = study(tmp_path)
    assert names(found) == [BASE, "wide"]
    assert found.asked.seeds == (0, 1, 2)
    assert found.asked.match.on == "tokens"
    hidden = [variant.experiment.model.blocks[0].feedforward.hidden for variant in found.variants]
    assert hidden == [8, 16]


def test_each_takes_entries_one_by_one_and_product_every_way_to_take_one_of_an_axis(tmp_path: Path) -> None:
    assert names(study(tmp_path, {AXES: TWO})) == [BASE, "wide", "wider", "many"]
    whole = study(tmp_path, {AXES: TWO + "design: product\n"})
    assert set(names(whole)) == {BASE, "wide", "wider", "many", "wide+many", "wider+many"}
    both = next(variant.experiment for variant in whole.variants if variant.name == "wider+many")
    block = both.model.blocks[0]
    assert (block.feedforward.hidden, block.attention.n_heads) == (32, 4)


def test_the_patch_of_the_study_is_laid_below_those_of_the_variants(tmp_path: Path) -> None:
    found = study(tmp_path, {"seeds: 3": "seeds: [7, 9]\npatch: {model: {dim: 4, block: {feedforward: {hidden: 4}}}}"})
    assert [variant.experiment.model.dim for variant in found.variants] == [4, 4]
    assert [variant.experiment.model.blocks[0].feedforward.hidden for variant in found.variants] == [4, 16]
    assert found.asked.seeds == (7, 9)


def test_a_seed_is_all_that_differs_between_the_cells_of_a_variant(tmp_path: Path) -> None:
    variant = study(tmp_path).variants[1]
    a, b = variant.seeded(3), variant.seeded(4)
    assert (a.train.seed, b.train.seed) == (3, 4)
    assert a != b
    assert a == variant.seeded(3)


def test_the_difference_of_a_variant_is_told_once_and_by_its_path(tmp_path: Path) -> None:
    assert study(tmp_path).differences() == {"wide": {"model.block.feedforward.hidden": (8, 16)}}


def test_a_difference_in_one_group_alone_is_told_of_that_group(tmp_path: Path) -> None:
    alone = "{model: {blocks: {'0': {feedforward: {hidden: 16}}}}}"
    found = study(tmp_path, {PATCH: alone})
    assert found.differences() == {"wide": {"model.blocks.0.feedforward.hidden": (8, 16)}}


def test_two_variants_that_are_one_are_refused_by_name_and_place(tmp_path: Path) -> None:
    again = TWO.replace("hidden: 32", "hidden: 16")
    with pytest.raises(ConfigError) as caught:
        study(tmp_path, {AXES: again})
    text = str(caught.value)
    assert "'wide' and 'wider' resolve to the same experiment" in text
    assert f"study.yaml:{line_of('wider', STUDY.replace(AXES, again))}: axes" in text


def test_a_variant_that_changes_nothing_is_the_base_again(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'base' and 'wide' resolve to the same experiment"):
        study(tmp_path, {"hidden: 16": "hidden: 8"})


MISTAKES = {
    "unknown key": ("seeds: 3", "seedz: 3", "seedz: unknown key, did you mean 'seeds'?"),
    "no seeds": ("seeds: 3", "seeds: []", "seeds: must have a length >= 1"),
    "zero seeds": ("seeds: 3", "seeds: 0", "seeds: must have a length >= 1"),
    "a seed twice": ("seeds: 3", "seeds: [1, 1]", "seeds: one stands there twice"),
    "seeds of no number": ("seeds: 3", "seeds: many", "seeds: expected a list, got 'many'"),
    "design": ("seeds: 3", "seeds: 3\ndesign: all", "design: must be one of 'each', 'product', got 'all'"),
    "match": ("seeds: 3", "seeds: 3\nmatch: token", "match.on: must be one of 'tokens'"),
    "match without by": ("seeds: 3", "seeds: 3\nmatch: parameters", "`by` names the field to solve for"),
    "by without match": ("seeds: 3", "seeds: 3\nmatch: {on: flops, by: x}", "`by` names the field to solve for"),
    "metrics as a list": ("{loss.next_token: lower}", "[loss.next_token]", "metrics: expected a map, got a list"),
    "metric without a side": ("lower}", "down}", "metrics.loss.next_token: must be one of 'lower', 'higher'"),
    "launcher": ("use: forking", "use: forkin", "there is no launcher 'forkin', did you mean 'forking'?"),
    "no axes": (AXES, "", "axes: is missing"),
    "an empty axis": (
        "\n    wide: {model: {block: {feedforward: {hidden: 16}}}}",
        "",
        "axes.feedforward: expected a map",
    ),
    "a patch of no map": (
        "{model: {block: {feedforward: {hidden: 16}}}}",
        "3",
        "axes.feedforward.wide: expected a patch",
    ),
    "a null": (PATCH, "null", "axes.feedforward.wide: expected a patch"),
    "a variant's name": ("wide:", "'a b':", "'a b' cannot be the name of a variant"),
    "a variant called base": ("wide:", "base:", "'base' cannot be the name of a variant"),
    "a name for a folder": ("name: toy", "name: ../toy", "name: must match regex"),
    "a seed in a patch": ("{model: {block", "{train: {seed: 3}, model: {block", "sets train.seed, which `seeds` does"),
    "what a preset refuses": (
        "hidden: 16",
        "hiden: 16",
        "did you mean 'hidden'? (in variant 'wide')",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_line(mistake: str, tmp_path: Path) -> None:
    old, new, expected = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        study(tmp_path, {old: new})
    text = str(caught.value)
    assert expected in text
    assert f"{tmp_path / 'study.yaml'}:" in text


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        study(tmp_path, {"seeds: 3": "seeds: x", "lower}": "down}", PATCH: "3"})
    assert [problem.path for problem in caught.value.problems] == [
        "seeds",
        "metrics.loss.next_token",
        "axes.feedforward.wide",
    ]


def test_the_same_entry_in_two_axes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is an entry 'wide' at .*study\.yaml:6 already"):
        study(tmp_path, {AXES: AXES + "  other:\n    wide: {model: {dim: 4}}\n"})


def test_a_base_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no preset file .*nothing\.yaml"):
        study(tmp_path, {"./toy.yaml": "./nothing.yaml"})


def test_a_plugin_file_of_the_patch_lies_beside_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "narrow.py").write_text(NARROW)
    monkeypatch.chdir("/")
    changed = {"seeds: 3": "seeds: 3\npatch: {plugins: [narrow.py]}", "hidden: 16": "use: narrow"}
    found = study(tmp_path, changed)
    assert type(found.variants[1].experiment.model.blocks[0].feedforward).__name__ == "NarrowConfig"
    assert tmp_path / "narrow.py" in found.plugins.files


NARROW = '''
from attrs import frozen
from tangram.core import component
from tangram.plugins.moe.swiglu import SwiGLUConfig

@component("feedforward", use="narrow")
@frozen(kw_only=True)
class NarrowConfig:
    """Half as wide.

    Attributes:
        hidden: Width.
    """
    hidden: int = 4

    def build(self, ctx):
        return SwiGLUConfig(hidden=self.hidden).build(ctx)
'''


def test_a_broken_plugin_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "narrow.py").write_text("import nothing_of_that_name")
    with pytest.raises(PluginError, match="nothing_of_that_name"):
        study(tmp_path, {"seeds: 3": "seeds: 3\npatch: {plugins: [narrow.py]}"})


def test_a_broken_base_is_told_before_any_variant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"toy\.yaml:3: model\.dim: .* got 'wide' \(in variant 'base'\)"):
        study(tmp_path, preset={"dim: 8": "dim: wide"})

"""The shipped presets against the papers: what they cost, and every curve at the points that the papers name."""

import math
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tangram.core.assembly import rehearse
from tangram.core.context import BuildError, Context
from tangram.core.curve import Curve
from tangram.core.measure import Parameters, measure
from tangram.core.plugins import Plugins
from tangram.core.presets import available, difference, dump, load_preset
from tangram.core.records import Progress
from tangram.kernels import frequencies
from tangram.plugins.attention.mla import MLA, MLAConfig
from tangram.testing import check_preset

SHIPPED = sorted(available(Plugins.discover()))
T = 10**12


def shape(dim: int, n_moe: int, expert: int, dense: int) -> int:
    """Return the weights of an auxiliary-loss-free model: 66 SwiGLU experts, 64 biases, a dense block, no tied head."""
    moe = 66 * 3 * dim * expert + 64 * dim + 64
    attention = 4 * dim**2 + 2 * dim
    return n_moe * moe + (n_moe + 1) * attention + 3 * dim * dense + 2 * 32064 * dim + dim


PARAMETERS = {
    "deepseek-v3": 671_026_419_200,
    "deepseek-v3-32k": 671_026_419_200,
    "deepseek-v3-128k": 671_026_419_200,
    "deepseek-v2-lite": 15_706_484_224,
    "aux-free-1b": shape(1024, 9, 512, 2736),
    "aux-free-3b": shape(1280, 11, 856, 3416),
    "v3-tiny": 6 * (32768 + 128 + 24576 + 20480 + 64 + 16384 + 32768)  # MLA
    + 5 * (33 * 3 * 256 * 128 + 32 * 256 + 32)
    + 3 * 256 * 512
    + 2 * 4096 * 256
    + 13 * 256,
    "v3-tiny-fp8": 19_517_984,
    "v3-tiny-parallel": 19_517_984,
    "v3-tiny-4k": 19_517_984,
    "gqa-baseline": 2 * 4096 * 256 + 13 * 256 + 6 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 640),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_keeps_the_laws_of_presets(name: str) -> None:
    check_preset(name, "data={use: synthetic}")  # text would train a tokenizer first


def test_a_preset_that_cannot_be_built_does_not_keep_them(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: v3-tiny\nname: mine\ndata: {use: synthetic}\n")
    check_preset(tmp_path / "mine.yaml")
    with pytest.raises(BuildError, match="feedforward"):
        check_preset(tmp_path / "mine.yaml", "model.block.feedforward.router.n_groups=5")


@cache
def parameters(name: str) -> Parameters:
    return measure(load_preset(name)).parameters


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_builds_without_weights_and_has_the_stated_parameters(name: str) -> None:
    assert parameters(name).total == PARAMETERS[name]


@pytest.mark.parametrize(("name", "active"), [("deepseek-v3", 36_625_618_432), ("deepseek-v2-lite", 2_451_435_008)])
def test_a_token_passes_through_as_many_parameters_as_published(name: str, active: int) -> None:
    # The published counts of active parameters leave the embedding out.
    assert parameters(name).active == active


@pytest.mark.parametrize(("name", "billions"), [("aux-free-1b", 1), ("aux-free-3b", 3)])
def test_the_auxiliary_loss_free_shapes_round_to_their_names(name: str, billions: int) -> None:
    assert round(PARAMETERS[name] / 1e9) == billions


@cache
def curve_of(name: str, path: str) -> Curve:
    value: object = dump(load_preset(name))
    for key in path.split("."):
        assert isinstance(value, dict)
        value = value[key]
    return Curve.parse(value)


SPEED = "model.block.feedforward.balancer.speed"
MTP = "objectives.mtp.weight"
BATCH = "train.batch_sequences"
LATE = 10**5
"""A step after every warm-up."""
V3_POINTS = [
    ("train.lr", 0, 0, 0.0),
    ("train.lr", 1000, 0, 1.1e-4),
    ("train.lr", 2000, 0, 2.2e-4),
    ("train.lr", LATE, 10 * T - 1, 2.2e-4),
    ("train.lr", LATE, 10 * T, 2.2e-4),
    ("train.lr", LATE, 12.15 * T, (2.2e-4 + 2.2e-5) / 2),
    ("train.lr", LATE, 14.3 * T, 2.2e-5),
    ("train.lr", LATE, 14.633 * T - 1, 2.2e-5),
    ("train.lr", LATE, 14.633 * T, 7.3e-6),
    ("train.lr", LATE, 14.8 * T, 7.3e-6),
    (BATCH, 0, 0, 3072),
    (BATCH, LATE, 234.5e9, (3072 + 15360) / 2),
    (BATCH, LATE, 469e9, 15360),
    (BATCH, LATE, 14.8 * T, 15360),
    (SPEED, 0, 0, 0.001),
    (SPEED, LATE, 14.3 * T - 1, 0.001),
    (SPEED, LATE, 14.3 * T, 0.0),
    (MTP, 0, 0, 0.3),
    (MTP, LATE, 10 * T - 1, 0.3),
    (MTP, LATE, 10 * T, 0.1),
    ("objectives.sequence_balance.weight", LATE, 5 * T, 0.0001),
]


@pytest.mark.parametrize(("path", "step", "tokens", "value"), V3_POINTS)
def test_every_curve_of_deepseek_v3_is_the_papers(path: str, step: int, tokens: float, value: float) -> None:
    now = Progress(step=step, tokens=int(tokens))
    assert curve_of("deepseek-v3", path)(now) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_the_last_batch_of_deepseek_v3_is_63_million_tokens() -> None:
    train = load_preset("deepseek-v3").train
    assert train.batch_sequences(Progress(step=LATE, tokens=T)) * train.sequence_length == 62_914_560


@pytest.mark.parametrize(
    ("name", "positions", "sequences"), [("deepseek-v3-32k", 32_768, 1920), ("deepseek-v3-128k", 131_072, 480)]
)
def test_a_long_context_stage_takes_the_papers_steps(name: str, positions: int, sequences: int) -> None:
    """Section 4.3: 1,000 steps on as many tokens as pre-training ended with, at its last learning rate."""
    experiment = load_preset(name)
    train = experiment.train
    assert (train.sequence_length, train.batch_sequences) == (positions, Curve.constant(sequences))
    assert positions * sequences == 62_914_560
    assert rehearse(experiment).steps == 1000
    end = Progress(step=LATE, tokens=14_800 * 10**9 - 1)
    for path in ("train.lr", SPEED, MTP, "objectives.sequence_balance.weight"):
        assert curve_of(name, path) == Curve.constant(curve_of("deepseek-v3", path)(end)), path


@pytest.mark.parametrize("name", ["deepseek-v3-32k", "deepseek-v3-128k"])
def test_yarn_stretches_deepseek_v3_as_its_release_does(name: str) -> None:
    """The rotations and the softmax scale of the released configuration, computed by hand."""
    layers = load_preset(name).model.layers()
    assert all(layer.attention == layers[0].attention for layer in layers)
    attention = layers[0].attention
    assert isinstance(attention, MLAConfig)
    with torch.device("meta"):
        built = attention.build(Context(dim=7168))
    assert isinstance(built, MLA)
    assert built.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-12)
    slowed = frequencies(64, 10_000.0, built.yarn) / frequencies(64, 10_000.0)
    assert slowed[:11].tolist() == [1.0] * 11  # those that turn more than 32 times in 4,096 positions
    assert slowed[23:].tolist() == pytest.approx([1 / 40] * 9, rel=1e-6)
    assert slowed[16].item() == pytest.approx(1 - 6 / 13 * (1 - 1 / 40), rel=1e-6)


def test_only_the_context_and_how_it_is_trained_changes_from_stage_to_stage() -> None:
    stages = [load_preset(name) for name in ("deepseek-v3", "deepseek-v3-32k", "deepseek-v3-128k")]
    block = "model.block.attention.yarn"
    groups = [f"model.blocks.{i}.attention.yarn" for i in (0, 1)]
    speeds = [f"{at}.feedforward.balancer.speed" for at in ("model.block", "model.blocks.1")]
    changed = [set(difference(a, b)) for a, b in pairwise(stages)]
    for path in changed[0]:
        assert path.startswith(("train.", "parallel.", "name", MTP, block, *groups, *speeds)), path
    for path in changed[1]:
        assert path.startswith(("train.", "parallel.", "name")), path
    assert [stage.train.init_from for stage in stages] == [None, "runs/deepseek-v3", "runs/deepseek-v3-32k"]


@pytest.mark.parametrize(
    ("name", "step", "tokens", "value"),
    [
        ("deepseek-v2-lite", 2000, 0, 4.2e-4),
        ("deepseek-v2-lite", LATE, 0.8 * 5.7 * T - 1, 4.2e-4),
        ("deepseek-v2-lite", LATE, 0.8 * 5.7 * T, 4.2e-4 * 0.316),
        ("deepseek-v2-lite", LATE, 0.9 * 5.7 * T, 4.2e-4 * 0.316**2),
        ("aux-free-1b", 1000, 0, 1e-3),
        ("aux-free-1b", 20500, 0, (1e-3 + 1e-4) / 2),
        ("aux-free-1b", 40000, 0, 1e-4),
        ("aux-free-3b", 45210, 0, 7.8e-4),
        ("aux-free-3b", 45211, 0, 2.47e-4),
        ("aux-free-3b", 50862, 0, 7.8e-5),
    ],
)
def test_the_learning_rates_of_the_other_papers_are_theirs(name: str, step: int, tokens: float, value: float) -> None:
    now = Progress(step=step, tokens=round(tokens))
    assert curve_of(name, "train.lr")(now) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("name", "steps"), [("aux-free-1b", 40_000), ("aux-free-3b", 56_514)])
def test_the_auxiliary_loss_free_runs_take_as_many_steps_as_the_paper(name: str, steps: int) -> None:
    assert rehearse(load_preset(name)).steps == steps


def test_v2_lite_uses_what_came_before_v3() -> None:
    lite = dump(load_preset("deepseek-v2-lite"))
    moe = lite["model"]["block"]["feedforward"]  # type: ignore[index,call-overload]
    assert (moe["router"]["score"], moe["router"]["normalise"]) == ("softmax", False)  # type: ignore[index,call-overload]
    assert moe["balancer"] == {"use": "none"}  # type: ignore[index,call-overload]
    assert "mtp" not in lite["objectives"]  # type: ignore[operator]

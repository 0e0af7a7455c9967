"""Muon (arXiv:2502.16982): matrices along orthogonal directions, all other weights as AdamW steps them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny
from torch import nn

from tangram.core.assembly import assemble
from tangram.core.step import set_lr, train_step
from tangram.plugins.training.adamw import AdamWConfig
from tangram.plugins.training.muon import MuonConfig, orthogonalised
from tangram.testing import seeds, tolerance
from tangram.testing.samples import normal

SHAPES = {
    "embedding.weight": (9, 4),
    "blocks.0.attention.out.weight": (6, 3),
    "blocks.0.feedforward.router.centroids.weight": (5, 4),
    "blocks.0.feedforward.down.weight": (2, 3, 4),
    "norm.weight": (4,),
}


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(normal(*shape, seed=seed + i, dtype=dtype)) for i, (name, shape) in enumerate(SHAPES.items())
    }


def take(optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter], steps: range, seed: int = 7) -> None:
    for step in steps:
        for i, parameter in enumerate(weights.values()):
            parameter.grad = normal(*parameter.shape, seed=seed + 100 * step + i, dtype=parameter.dtype)
        set_lr(optimizer, 0.01 / (1 + step))
        optimizer.step()


@given(rows=st.integers(2, 12), columns=st.integers(2, 12), scale=st.sampled_from((1e-8, 1.0, 1e6)), seed=seeds())
def test_singular_values_come_near_one_and_singular_vectors_stay(rows, columns, scale, seed):
    u, _, vt = torch.linalg.svd(normal(rows, columns, seed=seed), full_matrices=False)
    spread = torch.logspace(0, -1.5, len(vt), dtype=torch.float64)  # the least is above 1/500 of the norm
    moved = u.mT @ orthogonalised(scale * (u * spread) @ vt, steps=5) @ vt.mT
    values = moved.diagonal()
    assert 0.68 < float(values.min()) <= float(values.max()) < 1.21
    apart = moved - values.diag()
    # Each iteration passes rounding on, by at most its slope at zero.
    assert float(apart.abs().max()) < tolerance(torch.float64, 15 * max(rows, columns)) * 3.4445**5


def test_nothing_moves_a_matrix_whose_gradient_was_always_zero():
    assert torch.equal(orthogonalised(torch.zeros(3, 5), steps=5), torch.zeros(3, 5))


@given(rows=st.integers(2, 40), columns=st.integers(2, 40), ratio=st.sampled_from((1.0, 3.0)), seed=seeds())
def test_the_update_of_a_matrix_of_any_shape_has_the_size_of_one_of_adamw(rows, columns, ratio, seed):
    matrix = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
    optimizer = MuonConfig(ratio=ratio, steps=9).build([("out.weight", matrix)])
    matrix.grad = normal(rows, columns, seed=seed)
    set_lr(optimizer, 0.01)
    optimizer.step()
    size = float(matrix.detach().square().mean().sqrt())
    assert 0.68 * 0.2 < size / (ratio * 0.01) < 1.21 * 0.2


def test_weights_that_are_no_matrices_of_the_trunk_are_stepped_by_adamw_bit_for_bit():
    one, two = drawn(0), drawn(0)
    muon, adamw = MuonConfig().build(list(one.items())), AdamWConfig().build(list(two.items()))
    take(muon, one, range(3))
    take(adamw, two, range(3))
    differ = [name for name in SHAPES if not torch.equal(one[name], two[name])]
    assert differ == ["blocks.0.attention.out.weight"]


def test_the_matrices_of_the_model_are_attention_dense_and_shared_feedforwards_and_the_projection():
    run = assemble(tiny("optimizer={use: muon}"))
    ids = {id(p) for group in run.optimizer.param_groups if group["orthogonalise"] for p in group["params"]}
    named = dict(run.model.named_parameters())
    kinds = {
        name.split("blocks.")[-1].split("block.")[-1].lstrip("0123456789.") for name, p in named.items() if id(p) in ids
    }
    attention = {f"attention.{part}.weight" for part in ("q_down", "q_up", "kv_down", "kv_up", "out")}
    feed = {f"feedforward.{part}.weight" for part in ("gate_up", "down", "shared.gate_up", "shared.down")}
    assert kinds == attention | feed | {"objectives.mtp.depths.0.projection.weight"}
    assert all(named[name].ndim == 2 for name in named if id(named[name]) in ids)
    every = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(map(id, named.values()))


@pytest.mark.parametrize(
    ("nesterov", "grad", "sign"), [(False, -0.4, -1), (False, -0.6, 1), (True, -0.1, -1), (True, -0.2, 1)]
)
def test_momentum_is_the_decayed_mean_and_nesterov_mixes_the_gradient_in_again(nesterov, grad, sign):
    # A 1 x 1 matrix moves against the sign of its direction. After gradients 1 and g, and with decay 1/2, the mean is
    # 1/4 + g/2, which is negative below g = -1/2; mixed once more it is 1/8 + 3g/4, negative below -1/6.
    matrix = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    optimizer = MuonConfig(momentum=0.5, nesterov=nesterov, weight_decay=0.0).build([("out.weight", matrix)])
    set_lr(optimizer, 1.0)
    for value in (1.0, grad):
        before = float(matrix.detach())
        matrix.grad = torch.full_like(matrix, value)
        optimizer.step()
    assert math.copysign(1, float(matrix.detach()) - before) == sign


def test_decay_is_decoupled_and_follows_the_matrix_learning_rate():
    matrix = nn.Parameter(torch.eye(3, dtype=torch.float64))
    optimizer = MuonConfig(weight_decay=0.5, ratio=2.0).build([("out.weight", matrix)])
    matrix.grad = torch.zeros_like(matrix)
    set_lr(optimizer, 0.1)
    optimizer.step()
    assert torch.equal(matrix.detach(), (1 - 0.1 * 2.0 * 0.5) * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"momentum": 1.0}, "momentum"),
        ({"steps": 0}, "steps"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        MuonConfig(**settings)


def test_muon_trains_the_small_model():
    run = assemble(tiny("optimizer={use: muon}", "train.lr=0.02"))
    losses = [train_step(run, run.data.batch(run.progress, 4)).result.losses["next_token"] for _ in range(25)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.1

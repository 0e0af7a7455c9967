"""What token objectives owe whatever the batch is cut into or padded with."""

from collections.abc import Callable

import pytest
import torch
from attrs import evolve
from builders import CONDITION, SMALL_BLOCK
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tangram.core.contracts import TokenObjective
from tangram.core.records import IGNORE, Batch
from tangram.plugins.objectives.mtp import MTPConfig
from tangram.plugins.objectives.next_token import NextTokenConfig
from tangram.testing import batches, seeds, tolerance
from tangram.testing.samples import Trunk, context, filled, normal

DIM, VOCABULARY = 6, 11
LENGTH = 400
CONFIGS = {
    "next_token": NextTokenConfig(),
    "mtp": MTPConfig(depth=2),
    "mtp pre_norm": MTPConfig(depth=1, input="pre_norm"),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


class Setting:
    """An objective, what it borrows, and everything that its loss has a gradient for."""

    def __init__(self, config: NextTokenConfig | MTPConfig) -> None:
        objective = config.build(context(DIM), SMALL_BLOCK)
        assert isinstance(objective, TokenObjective)
        self.objective = filled(objective, 0)
        self.borrowed = Trunk(context(DIM), VOCABULARY, seed=1)

    def leaves(self) -> dict[str, Tensor]:
        return {**self.borrowed.parameters(), **dict(self.objective.named_parameters())}

    def loss(self, trunk: Tensor, batch: Batch) -> Tensor:
        return self.objective(trunk, batch, self.borrowed.shared).value


def assert_same(setting: Setting, trunk: Tensor, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> None:
    """Assert that two ways to the same loss have the same value and gradients."""
    wrt = {"trunk": trunk, **setting.leaves()}
    bound = CONDITION * tolerance(torch.float64, LENGTH)
    values = [one(), other()]
    grads = [torch.autograd.grad(value, list(wrt.values()), allow_unused=True) for value in values]
    assert (values[0] - values[1]).abs() <= bound * values[1].abs()
    largest = max([values[1].item(), *(float(grad.abs().max()) for grad in grads[1] if grad is not None)])
    for name, a, b in zip(wrt, *grads, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or (a - b).abs().max() <= bound * largest, name


@EVERY
@given(batch=batches(VOCABULARY, sequences=st.integers(2, 3)), seed=seeds())
def test_cutting_into_micro_batches_changes_nothing(config, batch, seed):
    setting, trunk = Setting(config), normal(*batch.tokens.shape, DIM, seed=seed).requires_grad_()
    count = len(batch.tokens)

    def cut() -> Tensor:
        losses = [setting.loss(trunk[i : i + 1], batch.micro(i, count)) for i in range(count)]
        return torch.stack(losses).sum()

    assert_same(setting, trunk, cut, lambda: setting.loss(trunk, batch))


@EVERY
@given(batch=batches(VOCABULARY, sequences=2), more=st.integers(1, 4), own=st.booleans(), seed=seeds())
def test_appended_padding_changes_nothing(config, batch, more, own, seed):
    setting, trunk = Setting(config), normal(*batch.tokens.shape, DIM, seed=seed).requires_grad_()
    last = batch.segments[:, -1:] + int(own)  # padding may be a document of its own, or the end of the last
    padded = evolve(
        batch,
        tokens=F.pad(batch.tokens, (0, more), value=3),
        targets=F.pad(batch.targets, (0, more), value=IGNORE),
        positions=F.pad(batch.positions, (0, more)),
        segments=torch.cat([batch.segments, last.expand(-1, more)], 1),
    )
    tail = normal(2, more, DIM, seed=seed + 1)
    assert_same(
        setting,
        trunk,
        lambda: setting.loss(torch.cat([trunk, tail], 1), padded),
        lambda: setting.loss(trunk, batch),
    )


@EVERY
@given(batch=batches(VOCABULARY, sequences=2, length=st.integers(3, 8), isolated=True), seed=seeds())
def test_a_packed_row_costs_what_its_documents_cost_apart(config, batch, seed):
    setting, trunk = Setting(config), normal(*batch.tokens.shape, DIM, seed=seed).requires_grad_()

    def apart() -> Tensor:
        losses = []
        for row in range(2):
            for number in batch.segments[row].unique():
                where = batch.segments[row] == number
                names = ("tokens", "targets", "positions", "segments")
                piece = evolve(batch, **{name: getattr(batch, name)[row][where][None] for name in names})
                losses.append(setting.loss(trunk[row][where][None], piece))
        return torch.stack(losses).sum()

    assert_same(setting, trunk, apart, lambda: setting.loss(trunk, batch))


@EVERY
def test_the_same_seed_gives_the_same_loss(config):
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        objective = config.build(context(DIM), SMALL_BLOCK)
        tokens = torch.arange(6)[None]
        batch = Batch(tokens, tokens, tokens, torch.zeros_like(tokens), 6, 1)
        shared = Trunk(context(DIM), VOCABULARY, seed=1).shared
        losses.append(objective(normal(1, 6, DIM, seed=2), batch, shared).value)
    assert torch.equal(*losses)


@EVERY
def test_it_builds_without_memory(config):
    with torch.device("meta"):
        objective = config.build(context(DIM), SMALL_BLOCK)
    assert all(tensor.is_meta for tensor in objective.state_dict().values())

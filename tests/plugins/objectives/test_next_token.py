"""The main loss against its definition."""

import paper
import torch
from builders import SMALL_BLOCK, assert_same_function
from hypothesis import given
from torch import Tensor

from tangram.core.contracts import TokenObjective
from tangram.core.records import Batch, Progress
from tangram.plugins.objectives.next_token import NextTokenConfig
from tangram.testing import batches, curves
from tangram.testing.samples import Trunk, context, normal

DIM, VOCABULARY = 5, 11
LENGTH = 80
"""Terms of the longest chain: reductions over 5, 11 and at most 36 tokens, there and back."""


def built() -> TokenObjective:
    objective = NextTokenConfig().build(context(DIM), SMALL_BLOCK)
    assert isinstance(objective, TokenObjective)
    return objective


def equations(trunk: Tensor, batch: Batch, borrowed: Trunk) -> Tensor:
    assert batch.targets is not None
    rows = []
    for h, targets in zip(trunk, batch.targets, strict=True):
        normed = paper.rms_norm(h, borrowed.norm.weight)
        logits = torch.stack([paper.linear(borrowed.head.weight, x) for x in normed])
        rows.append(paper.next_token(logits, targets, batch.n_targets))
    return torch.stack(rows).sum()


@given(batch=batches(VOCABULARY))
def test_value_and_gradients_are_the_definition(batch):
    borrowed = Trunk(context(DIM), VOCABULARY, seed=0)
    trunk = normal(*batch.tokens.shape, DIM, seed=1).requires_grad_()
    wrt = {"trunk": trunk, "norm": borrowed.norm.weight, "head": borrowed.head.weight}
    actual = built()(trunk, batch, borrowed.shared).value
    assert_same_function(actual, equations(trunk, batch, borrowed), wrt, length=LENGTH)


def test_a_head_that_knows_nothing_pays_the_logarithm_of_the_vocabulary():
    borrowed = Trunk(context(DIM, compute=torch.float32), VOCABULARY, seed=0)
    torch.nn.init.zeros_(borrowed.head.weight)
    targets = torch.tensor([[1, 2, -100, 4]])
    batch = Batch(targets.clamp_min(0), targets, torch.arange(4)[None], torch.zeros_like(targets), 3, 1)
    loss = built()(normal(1, 4, DIM, seed=1, dtype=torch.float32), batch, borrowed.shared).value
    torch.testing.assert_close(loss, torch.tensor(float(VOCABULARY)).log())


@given(curve=curves())
def test_the_weight_follows_its_curve(curve):
    objective = NextTokenConfig(weight=curve).build(context(DIM), SMALL_BLOCK)
    for now in (Progress(), Progress(step=500, tokens=10**9), Progress(step=10**5, tokens=20 * 10**12)):
        assert objective.weight(now) == curve(now)

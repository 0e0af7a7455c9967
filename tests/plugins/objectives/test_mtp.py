"""Multi-token prediction against the paper's equations (arXiv:2412.19437, 21 to 25)."""

from collections.abc import Sequence

import paper
import pytest
import torch
from attrs import evolve
from builders import SMALL_BLOCK, assert_same_function, paper_block, paper_depth
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.block import Block
from tangram.core.curve import Curve
from tangram.core.experiment import BlockConfig
from tangram.core.records import IGNORE, Batch, Progress
from tangram.plugins.moe.swiglu import SwiGLUConfig
from tangram.plugins.objectives.mtp import MTP, MTPConfig, further_targets
from tangram.testing import batches, seeds
from tangram.testing.samples import Trunk, context, filled, normal, packed

DIM, VOCABULARY = 6, 11
LENGTH = 600
"""Terms of the longest chain: three blocks of some eight reductions over 3 to 16, there and back."""


def built(config: MTPConfig, block: BlockConfig = SMALL_BLOCK, eps: float = 1e-6) -> MTP:
    objective = config.build(context(DIM, eps=eps), block)
    assert isinstance(objective, MTP)
    return filled(objective, 0)


def papers(objective: MTP, eps: float = 1e-6) -> list[paper.MTPDepth]:
    """Return the depths with blocks worked as the paper's equations have them."""
    depths = []
    for depth in objective.depths:
        block = depth.get_submodule("block")
        assert isinstance(block, Block)
        depths.append(paper_depth(depth, paper_block(block, SMALL_BLOCK, eps)))
    return depths


def equations(
    objective: MTP, entry: Tensor, batch: Batch, borrowed: Trunk, depths: Sequence[paper.MTPDepth], eps: float
) -> Tensor:
    rows = [
        paper.mtp(
            *row,
            depths=depths,
            embedding=borrowed.embedding.weight,
            head=borrowed.head.weight,
            eps=eps,
            n_targets=batch.n_targets,
        )
        for row in zip(entry, batch.tokens, batch.targets, batch.positions, batch.segments, strict=True)
    ]
    return torch.stack(rows).sum()


@settings(max_examples=15)
@given(
    batch=batches(VOCABULARY, sequences=st.integers(1, 2), length=st.integers(2, 6)),
    depth=st.integers(1, 3),
    seed=seeds(),
)
def test_value_and_gradients_are_the_papers(batch, depth, seed):
    objective, borrowed = built(MTPConfig(depth=depth)), Trunk(context(DIM), VOCABULARY, seed=1)
    trunk = normal(*batch.tokens.shape, DIM, seed=seed).requires_grad_()
    wrt = {"trunk": trunk, **borrowed.parameters(), **dict(objective.named_parameters())}
    depths = papers(objective)
    entry = paper.rms_norm(trunk, borrowed.norm.weight)
    expected = equations(objective, entry, batch, borrowed, depths, 1e-6)
    assert_same_function(objective(trunk, batch, borrowed.shared).value, expected, wrt, length=LENGTH)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_before_the_norm_it_is_the_papers_on_the_residual_stream(depth):
    """The paper's function hands on what the head reads; a norm of weight one in between does nothing."""
    eps = 1e-18
    objective = built(MTPConfig(depth=depth, input="pre_norm"), eps=eps)
    borrowed = Trunk(context(DIM, eps=eps), VOCABULARY, seed=1)
    between = [f"depths.{k}.norm.weight" for k in range(depth - 1)]
    for name in between:
        torch.nn.init.ones_(objective.get_parameter(name))
    batch = packed([[0, 0, 0, 1, 1, 1, 1], [0] * 7], VOCABULARY, seed=2)
    trunk = normal(2, 7, DIM, seed=3).requires_grad_()
    own = {name: parameter for name, parameter in objective.named_parameters() if name not in between}
    wrt = {"trunk": trunk, "embedding": borrowed.embedding.weight, "head": borrowed.head.weight, **own}
    depths = papers(objective, eps)
    expected = equations(objective, trunk, batch, borrowed, depths, eps)
    actual = objective(trunk, batch, borrowed.shared).value
    assert_same_function(actual, expected, wrt, length=LENGTH)
    assert torch.autograd.grad(actual, borrowed.norm.weight, allow_unused=True) == (None,)


def test_any_block_serves():
    block = evolve(SMALL_BLOCK, feedforward=SwiGLUConfig(hidden=3))
    objective, borrowed = built(MTPConfig(depth=2), block), Trunk(context(DIM), VOCABULARY, seed=1)
    batch = packed([[0, 0, 0, 0, 1, 1]], VOCABULARY, seed=2)
    trunk = normal(1, 6, DIM, seed=3).requires_grad_()

    def own(part: torch.nn.Module) -> paper.Block:
        assert isinstance(part, Block)
        return lambda h, positions, segments: part(h[None], positions[None], segments[None]).hidden[0]

    depths = [paper_depth(depth, own(depth.get_submodule("block"))) for depth in objective.depths]
    entry = paper.rms_norm(trunk, borrowed.norm.weight)
    wrt = {"trunk": trunk, **borrowed.parameters(), **dict(objective.named_parameters())}
    expected = equations(objective, entry, batch, borrowed, depths, 1e-6)
    assert_same_function(objective(trunk, batch, borrowed.shared).value, expected, wrt, length=LENGTH)


# --- its own choices -------------------------------------------------------------------------------


@given(batch=batches(VOCABULARY), k=st.integers(1, 12))
def test_a_target_further_on_is_of_the_same_document_and_the_last_k_are_masked(batch, k):
    further = further_targets(batch, k)
    rows, length = batch.tokens.shape
    for row in range(rows):
        for p in range(length):
            known = p + k < length and bool(batch.segments[row, p] == batch.segments[row, p + k])
            expected = int(batch.targets[row, p + k]) if known else IGNORE
            assert int(further[row, p]) == expected


def test_a_document_too_short_for_a_depth_pays_nothing_for_it():
    objective, borrowed = built(MTPConfig(depth=3)), Trunk(context(DIM), VOCABULARY, seed=1)
    batch = packed([[0, 1, 2, 3]], VOCABULARY, seed=2)
    assert objective(normal(1, 4, DIM, seed=3), batch, borrowed.shared).value.item() == 0.0


def test_each_depth_is_divided_by_all_targets_and_by_the_depth():
    borrowed = Trunk(context(DIM), VOCABULARY, seed=1)
    torch.nn.init.zeros_(borrowed.head.weight)
    batch = packed([[0] * 6], VOCABULARY, seed=2)
    loss = built(MTPConfig(depth=2))(normal(1, 6, DIM, seed=3), batch, borrowed.shared).value
    nats = torch.tensor(float(VOCABULARY), dtype=torch.float64).log()
    torch.testing.assert_close(loss, nats * (5 + 4) / 6 / 2, rtol=1e-14, atol=0)


def test_each_depth_joins_passes_its_block_and_is_scored():
    objective, borrowed = built(MTPConfig(depth=2)), Trunk(context(DIM), VOCABULARY, seed=1)
    phases = objective.phases("further", packed([[0] * 8], VOCABULARY, seed=2), borrowed.shared)
    assert [phase.name for phase in phases] == 2 * ["join", "attend", "dispatch", "compute", "combine", "score"]
    assert [feedforward.n_experts for feedforward in objective.feedforwards()] == [4, 4]


def test_the_trunk_is_read_by_the_first_depth_alone():
    objective, borrowed = built(MTPConfig(depth=2)), Trunk(context(DIM), VOCABULARY, seed=1)
    batch, trunk = packed([[0] * 6], VOCABULARY, seed=2), normal(1, 6, DIM, seed=3)
    with torch.no_grad():
        objective.get_parameter("depths.0.projection.weight").zero_()
    one, other = (objective(x, batch, borrowed.shared).value for x in (trunk, -trunk))
    assert torch.equal(one, other)


def test_the_weight_follows_its_curve():
    curve = Curve.parse([{"until": 100, "value": 0.3}, {"value": 0.1}])
    objective = built(MTPConfig(weight=curve))
    assert [objective.weight(Progress(tokens=tokens)) for tokens in (0, 99, 100)] == [0.3, 0.3, 0.1]


@pytest.mark.parametrize(("name", "value"), [("depth", 0), ("input", "middle")])
def test_a_setting_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        MTPConfig(**{name: value})

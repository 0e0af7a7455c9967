"""Recomputation over blocks and models: not a bit of a gradient moves, and less is held."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from attrs import evolve
from builders import SMALL_BLOCK, SMALL_MLA
from tiny import tiny
from torch import Tensor

from tangram.core import build_model
from tangram.core.activations import Made
from tangram.core.block import Block
from tangram.core.context import Parallel
from tangram.core.experiment import RECOMPUTE, BlockConfig, Experiment
from tangram.core.records import Carry, Progress
from tangram.plugins.attention.gqa import GQAConfig
from tangram.plugins.moe.swiglu import SwiGLUConfig
from tangram.testing.samples import context, documents, filled, normal, packed

DIM = 6
LENGTH = 12
BLOCKS = {
    "mla and moe": SMALL_BLOCK,
    "mla and swiglu": BlockConfig(attention=evolve(SMALL_MLA, q_rank=None), feedforward=SwiGLUConfig(hidden=7)),
    "gqa and moe": evolve(SMALL_BLOCK, attention=GQAConfig(n_heads=2, head_dim=4)),
}
EVERY = pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS.keys())


def worked(config: BlockConfig, policy: str, x: Tensor, segments: list[list[int]]) -> tuple[Block, Tensor]:
    """Return a block and its output, each phase in a scope of its own as a model runs it."""
    block = filled(Block(config, context(DIM, recompute=policy)), 0)
    carry = Carry(hidden=x)
    for phase in block.phases(*documents(segments)):
        with block.recompute.scope():
            carry = phase.fn(carry)
    assert carry.hidden is not None
    return block, carry.hidden


def held(run: Callable[[], tuple[Block, Tensor]]) -> int:
    """Return the bytes that are alive after a forward because its backward wants them."""
    with Made() as made:
        kept = run()
    assert kept[1].requires_grad
    return made.alive()


@EVERY
@pytest.mark.parametrize("segments", [[[0] * 5, [0] * 5], [[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]])
def test_gradients_are_those_of_the_plain_forward_bit_for_bit(config, segments):
    grads = []
    for policy in RECOMPUTE:
        x = normal(2, 5, DIM, seed=1).requires_grad_()
        block, out = worked(config, policy, x, segments)
        out.sin().sum().backward()
        named = {name: parameter.grad for name, parameter in block.named_parameters()}
        grads.append({"out": out.detach(), "x": x.grad, **named})
    for name, plain in grads[0].items():
        assert plain is not None, name
        assert plain.any(), name
        assert all(torch.equal(plain, other[name]) for other in grads[1:]), name


def gradients(experiment: Experiment, policy: str, *, deferred: bool) -> dict[str, Tensor]:
    """Return all gradients of a step's losses."""
    parallel = Parallel()
    model = build_model(evolve(experiment, model=evolve(experiment.model, recompute=policy)), parallel=parallel)
    carry = model(packed([[0] * LENGTH, [0] * 5 + [1] * 7], experiment.model.vocab_size, seed=3), Progress())
    losses = [loss.value for _, loss in carry.losses]
    with parallel.weight_grads.deferred() if deferred else nullcontext([]) as pending:
        torch.autograd.backward(losses, [torch.full_like(loss, 0.5) for loss in losses])
    assert bool(pending) == deferred
    for add in pending:
        add()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "overrides",
    [
        ("precision={use: full, compute: float32}",),
        ("precision={use: full, compute: bfloat16}", "objectives.mtp.depth=2"),
        ("precision={use: fp8, compute: float32}",),
        ("precision={use: fp8, attention_cache: e5m6}", "model.block.attention={use: gqa, n_heads: 2, head_dim: 6}"),
    ],
    ids=["float32", "bfloat16, two depths of MTP", "fp8 in float32", "fp8 in bfloat16, gqa"],
)
def test_no_bit_of_a_model_moves_whatever_is_made_again_and_whenever_weights_have_their_gradients(overrides):
    experiment = tiny(*overrides)
    plain = gradients(experiment, "none", deferred=False)
    assert all(grad is not None for grad in plain.values())
    for policy, deferred in list(product(RECOMPUTE, (False, True)))[1:]:
        other = gradients(experiment, policy, deferred=deferred)
        assert [name for name in plain if not torch.equal(plain[name], other[name])] == [], (policy, deferred)


def test_a_cache_is_written_once_also_where_all_is_made_again():
    written = []
    for policy in RECOMPUTE:
        block = filled(Block(SMALL_BLOCK, context(DIM, recompute=policy)), 0)
        cache, carry = block.attention.new_cache(1, 8), Carry(hidden=normal(1, 5, DIM, seed=1).requires_grad_())
        for phase in block.phases(*documents([[0] * 5]), cache):
            with block.recompute.scope():
                carry = phase.fn(carry)
        carry.hidden.sum().backward()
        written.append((cache.lengths, block.attention.kv_down.weight.grad))
    assert [lengths.tolist() for lengths, _ in written] == [[5]] * len(RECOMPUTE)
    assert all(torch.equal(grad, written[0][1]) for _, grad in written[1:])


@pytest.mark.parametrize(
    ("name", "width"),
    # Queries, keys, keys with values as they come up from the latent; the product inside each SwiGLU.
    [("mla and moe", 14 + 14 + 16 + 2 * 3), ("mla and swiglu", 14 + 14 + 16 + 7), ("gqa and moe", 2 * 3)],
)
def test_what_can_be_made_again_is_not_held_for_backward(name, width):
    x = normal(2, 64, DIM, seed=1).requires_grad_()
    plain, selective, full = (
        held(lambda policy=policy: worked(BLOCKS[name], policy, x, [[0] * 64] * 2)) for policy in RECOMPUTE
    )
    assert plain - selective >= width * 2 * 64 * x.element_size()
    # Attention's probabilities, of one block of queries, are what only the whole can make again.
    assert selective - full >= 2 * 2 * 64 * 64 * x.element_size()

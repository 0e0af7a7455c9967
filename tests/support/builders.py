"""Small components in float64, filled with visible weights, and their weights under the paper's names.

The paper's functions are given the component's own parameters, so that autograd gives both sides their
gradients under the same names.
"""

from collections.abc import Mapping, Sequence

import paper
import torch
from torch import Tensor, nn

from tangram.core.block import Block
from tangram.core.contracts import FeedForward
from tangram.core.experiment import BlockConfig
from tangram.plugins.attention.gqa import GQA
from tangram.plugins.attention.mla import MLA, MLAConfig
from tangram.plugins.moe.balancers import AuxFreeConfig
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.plugins.moe.local import LocalConfig
from tangram.plugins.moe.moe import MoE, MoEConfig
from tangram.testing import tolerance
from tangram.testing.samples import normal

EXACT_THETA = 4096.0
"""A rotary base whose frequencies for widths 2, 4, 6 and 8 are powers of two: exact in float32 tables."""

CONDITION = 64.0
"""How many times rounding may grow: a norm divides by the size of its input, and latents of 1/64 occur."""

SMALL_MLA = MLAConfig(n_heads=2, q_rank=5, kv_rank=6, nope_dim=3, rope_dim=4, value_dim=5, theta=EXACT_THETA)
SMALL_MOE = MoEConfig(
    n_experts=4,
    n_shared=1,
    hidden=3,
    router=GroupLimitedConfig(top_k=2, n_groups=2, top_groups=1, gate_scale=2.5),
    balancer=AuxFreeConfig(),
    dispatcher=LocalConfig(),
)
SMALL_BLOCK = BlockConfig(attention=SMALL_MLA, feedforward=SMALL_MOE)


def assert_same_function(
    actual: Tensor, expected: Tensor, wrt: Mapping[str, Tensor], *, length: int, seed: int = 0
) -> None:
    """Assert equal values, and equal gradients of a drawn direction with respect to all of `wrt`.

    All gradients have one scale, the largest of them or of the values: behind a norm of few values, or of
    gates that are one whatever the scores, hardly more than rounding may be left of a gradient.
    """
    bound = CONDITION * tolerance(torch.float64, length)
    assert (actual - expected).abs().max() <= bound * expected.abs().max()
    direction = normal(*actual.shape, seed=seed)
    pairs = [_gradients(value, list(wrt.values()), direction) for value in (actual, expected)]
    largest = max(float(t.abs().max()) for t in (expected.detach(), *pairs[1]) if t is not None)
    for name, one, other in zip(wrt, *pairs, strict=True):
        # The paper's loops never touch an expert that no token chose; the component's gradient of it is zero.
        error = (_or_zeros(one, wrt[name]) - _or_zeros(other, wrt[name])).abs().max()
        assert error <= bound * largest, f"the gradient of {name} is off by {error:.3g}, of {largest:.3g}"


def _gradients(value: Tensor, wrt: list[Tensor], direction: Tensor) -> Sequence[Tensor | None]:
    if not value.requires_grad:  # a sum without terms
        return [None] * len(wrt)
    return torch.autograd.grad(value, wrt, direction, allow_unused=True, retain_graph=True)


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


# --- the same weights under the paper's names ------------------------------------------------------


def mla_weights(module: MLA) -> dict[str, Tensor]:
    names = {"kv_a": "kv_down", "kv_norm": "kv_norm", "kv_b": "kv_up", "o": "out"}
    compressed = {"q_a": "q_down", "q_norm": "q_norm", "q_b": "q_up"}
    names |= {"q": "q_up"} if module.config.q_rank is None else compressed
    return {name: module.get_parameter(f"{address}.weight") for name, address in names.items()}


def mla_shape(config: MLAConfig, eps: float = 1e-6) -> paper.MLAShape:
    y = config.yarn
    yarn = y and paper.Yarn(
        factor=y.factor,
        original_length=y.original_length,
        beta_fast=y.beta_fast,
        beta_slow=y.beta_slow,
        mscale=y.mscale,
    )
    return paper.MLAShape(
        n_heads=config.n_heads,
        nope_dim=config.nope_dim,
        rope_dim=config.rope_dim,
        value_dim=config.value_dim,
        theta=config.theta,
        eps=eps,
        yarn=yarn,
    )


def gqa_weights(module: GQA) -> dict[str, Tensor]:
    keys, values = module.get_parameter("kv.weight").chunk(2)
    q, out = module.get_parameter("q.weight"), module.get_parameter("out.weight")
    return {"q": q, "k": keys, "v": values, "o": out}


def moe_weights(module: FeedForward) -> dict[str, Tensor]:
    names = {"centroids": "router.centroids", "gate_up": "gate_up", "down": "down"}
    if isinstance(module, MoE) and module.shared is not None:
        names |= {"shared_gate_up": "shared.gate_up", "shared_down": "shared.down"}
    return {name: module.get_parameter(f"{address}.weight") for name, address in names.items()}


def paper_block(block: Block, config: BlockConfig, eps: float = 1e-6) -> paper.Block:
    """Return a block of MLA and a group-limited MoE with shared experts, as the paper's equations have it."""
    attention, feedforward = config.attention, config.feedforward
    assert isinstance(attention, MLAConfig)
    assert isinstance(feedforward, MoEConfig)
    assert isinstance(block.attention, MLA)
    assert isinstance(block.feedforward, MoE)
    router = feedforward.router
    assert isinstance(router, GroupLimitedConfig)
    of_attention, of_experts = mla_weights(block.attention), moe_weights(block.feedforward)
    bias = block.feedforward.balancer.bias()

    def run(h: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        normed = paper.rms_norm(h, block.attention_norm.weight, eps)
        h = h + paper.mla(normed, of_attention, mla_shape(attention, eps), positions, segments)
        u = paper.rms_norm(h, block.feedforward_norm.weight, eps)
        routes, _ = route(u, of_experts["centroids"], bias, router)
        return h + paper.moe(u, of_experts, routes)

    return run


def route(
    u: Tensor, centroids: Tensor, bias: Tensor, config: GroupLimitedConfig
) -> tuple[list[dict[int, Tensor]], Tensor]:
    """Return the paper's routes of one sequence u [S, D] under a config of the component."""
    return paper.route_group_limited(
        u,
        centroids,
        bias,
        top_k=config.top_k,
        n_groups=config.n_groups,
        top_groups=config.top_groups,
        scale=config.gate_scale,
        score=config.score,
        normalise=config.normalise,
    )


def paper_depth(depth: nn.Module, block: paper.Block) -> paper.MTPDepth:
    """Return the weights of one depth of multi-token prediction around a block."""
    return paper.MTPDepth(
        embedding_norm=depth.get_parameter("embedding_norm.weight"),
        hidden_norm=depth.get_parameter("hidden_norm.weight"),
        projection=depth.get_parameter("projection.weight"),
        block=block,
        output_norm=depth.get_parameter("norm.weight"),
    )

"""Cases of what goes through memory once: RMSNorm, SwiGLU, rotary embedding, and tokens to experts and back."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from operations.case import Case, Function, Peer, Result, near, same_bits
from operations.scale import Scale
from tangram.kernels import (
    accumulator,
    frequencies,
    order_by_expert,
    permute,
    rmsnorm,
    rotate,
    rotation,
    swiglu,
    unpermute,
)

EPS = 1e-6
STEPS = 10
"""Roundings of an element of SwiGLU and its gradient: an exponential, a sigmoid and what is multiplied with it."""


def cases(scale: Scale) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield them."""
    for name, make in (("rmsnorm", _rmsnorm), ("swiglu", _swiglu)):
        for backward in (False, True):
            yield _directed(name, backward), partial(make, scale, backward)
    for interleaved in (True, False):
        yield "rotate", partial(_rotate, scale, interleaved)
    for name, make in (("permute", _permute), ("unpermute", _unpermute)):
        for backward in (False, True):
            yield _directed(name, backward), partial(make, scale, backward)


def _directed(name: str, backward: bool) -> str:
    return f"{name}, {'backward' if backward else 'forward'}"


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))


def _rmsnorm(scale: Scale, backward: bool) -> Case:
    x, weight = scale.draw(scale.tokens, scale.dim), scale.draw(scale.dim)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        wide = _wide(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight

    return Case(
        operation=_directed("rmsnorm", backward),
        shape=f"{scale.tokens} x {scale.dim}",
        inputs=(x, weight),
        ours=lambda x, weight: rmsnorm(x, weight, EPS),
        formula=formula,
        check=near(2 * scale.dim, scale.dim + scale.tokens) if backward else near(scale.dim),
        peers={
            "F.rms_norm": Peer(lambda: lambda x, weight: F.rms_norm(x, (scale.dim,), weight, EPS)),
            "transformers": Peer(_transformers_norm),
            "Liger": Peer(_liger_norm),
        },
        arriving=(scale.draw(scale.tokens, scale.dim),) if backward else (),
        wanted=(0, 1),
    )


def _transformers_norm() -> Function:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    norm = DeepseekV3RMSNorm.forward
    return lambda x, weight: norm(SimpleNamespace(weight=weight, variance_epsilon=EPS), x)


def _liger_norm() -> Function:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def _swiglu(scale: Scale, backward: bool) -> Case:
    rows = scale.tokens

    def formula(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    return Case(
        operation=_directed("swiglu", backward),
        shape=f"{rows} x 2 * {scale.hidden}",
        inputs=(scale.draw(rows, 2 * scale.hidden),),
        ours=swiglu,
        formula=formula,
        check=near(STEPS),
        peers={"Liger": Peer(_liger_swiglu)},
        arriving=(scale.draw(rows, scale.hidden),) if backward else (),
        wanted=(0,),
    )


def _liger_swiglu() -> Function:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return lambda x: LigerFusedGateUpSiLUMulFunction.apply(x, False)


def _rotate(scale: Scale, interleaved: bool) -> Case:
    x = scale.draw(1, scale.tokens, scale.heads, scale.rope_dim)
    positions = torch.arange(scale.tokens, device=scale.device)[None]
    cos, sin = rotation(positions, frequencies(scale.rope_dim, 1e4, device=scale.device), scale.dtype)

    def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide, c, s = _wide(x), cos[:, :, None], sin[:, :, None]
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
        turned = first * c - second * s, first * s + second * c
        return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)

    peers = {"transformers": Peer(_transformers_pairs, _in_pairs)}
    if not interleaved:
        peers = {"transformers": Peer(_transformers_halves), "Liger": Peer(partial(_liger_rotate, x))}
    return Case(
        operation="rotate",
        shape=f"{scale.tokens} x {scale.heads} x {scale.rope_dim}, {'pairs' if interleaved else 'halves'}",
        inputs=(x, cos, sin),
        ours=lambda x, cos, sin: rotate(x, cos, sin, interleaved),
        formula=formula,
        check=near(3),
        peers=peers,
    )


def _in_pairs(result: Result) -> Result:
    """Return pairs where the peer leaves halves."""
    assert isinstance(result, Tensor)
    return torch.stack(result.chunk(2, -1), -1).flatten(-2)


def _transformers_pairs() -> Function:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    return partial(_one_of_two, apply_rotary_pos_emb_interleave)


def _transformers_halves() -> Function:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb

    return partial(_one_of_two, apply_rotary_pos_emb)


def _one_of_two(turn: Callable[..., tuple[Tensor, Tensor]], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the queries turned by a function of queries and keys, of which there are none."""
    tables = (torch.cat([t, t], -1).to(x.dtype) for t in (cos, sin))
    return turn(x, x[:, :, :0], *tables, unsqueeze_dim=2)[0]


def _liger_rotate(x: Tensor) -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    heads_first = x.clone().transpose(1, 2)  # it turns them where they lie
    key = heads_first[:, :1].clone()

    def run(_: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tables = (torch.cat([t, t], -1).to(x.dtype) for t in (cos, sin))
        return LigerRopeFunction.apply(heads_first, key, *tables)[0].transpose(1, 2)

    return run


def _permute(scale: Scale, backward: bool) -> Case:
    order = _order(scale)
    return Case(
        operation=_directed("permute", backward),
        shape=f"{scale.rows} x {scale.top_k} x {scale.dim}",
        inputs=(scale.draw(scale.rows, scale.dim),),
        ours=lambda x: permute(x, order),
        formula=lambda x: x[order.index],
        reference=None if backward else lambda x: x[order.index],
        check=near(scale.top_k + 1) if backward else same_bits,
        arriving=(scale.draw(scale.rows * scale.top_k, scale.dim),) if backward else (),
        wanted=(0,),
    )


def _unpermute(scale: Scale, backward: bool) -> Case:
    order = _order(scale)
    gates = scale.draw(scale.rows, scale.top_k, dtype=torch.float32).softmax(-1)
    return Case(
        operation=_directed("unpermute", backward),
        shape=f"{scale.rows} x {scale.top_k} x {scale.dim}",
        inputs=(scale.draw(scale.rows * scale.top_k, scale.dim), gates),
        ours=lambda rows, gates: unpermute(rows, gates, order),
        formula=lambda rows, gates: (rows[order.inverse] * gates.unsqueeze(-1)).sum(1).to(rows.dtype),
        check=near(1, scale.dim) if backward else near(scale.top_k + 1),
        arriving=(scale.draw(scale.rows, scale.dim),) if backward else (),
        wanted=(0, 1),
    )


def _order(scale: Scale):  # type: ignore[no-untyped-def]
    """Return where tokens go that choose experts at random."""
    chosen = scale.draw(scale.rows, scale.routed, dtype=torch.float32).topk(scale.top_k).indices
    return order_by_expert(chosen, scale.routed)

"""Rotary position embedding (arXiv:2104.09864), stretched by YaRN (arXiv:2309.00071).

Pair i of a vector at position p is turned by the angle p * f_i, with f_i = theta^(-2i / R):

    (a, b) -> (a cos - b sin, a sin + b cos)

so that the product of two turned vectors depends on their positions only through the difference. What arrives in
backward is turned by the opposite angle. A pair is
either interleaved, elements (2i, 2i + 1) as in the released DeepSeek-V3 weights, or split, (i, i + R/2).

YaRN slows the pairs that turn less than `beta_slow` times over the original length by `factor`, leaves those
that turn more than `beta_fast` times alone, and goes linearly between. It also makes the softmax sharper.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tangram.kernels import few_rows
from tangram.kernels.backend import takes_kernel
from tangram.kernels.jit import tl, triton, wide_type
from tangram.kernels.products import accumulator

_TILE = 4096
"""Numbers that one program of the kernel turns."""


class Yarn(NamedTuple):
    """How YaRN stretches a context.

    Attributes:
        factor: New length over the original one.
        original_length: Positions seen before.
        beta_fast: Turns over the original length from which a pair keeps its frequency.
        beta_slow: Turns below which a pair is slowed by the whole factor.
        mscale: Growth of queries and keys with ln(factor). Released configs state it twice, as `mscale` and
            `mscale_all_dim`: only their ratio, which is 1, would scale the turned elements alone.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0

    @property
    def softmax_correction(self) -> float:
        """Factor on the softmax scale, 1/t of arXiv:2309.00071: query and key both grow, turned or not."""
        return (1.0 + 0.1 * self.mscale * math.log(max(self.factor, 1.0))) ** 2


@cache
def frequencies(dim: int, theta: float, yarn: Yarn | None = None, device: torch.device | str | None = None) -> Tensor:
    """Return the angle by which each of the `dim`/2 pairs turns per position, in radians, float32 [dim/2].

    Computed in float64.

    Raises:
        ValueError: `dim` is odd.
    """
    if dim % 2:
        raise ValueError(f"rotary embedding turns pairs, but its width is {dim}; make it even")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    plain = theta**-exponents
    if yarn is None:
        return plain.float()
    slowed = _ramp(dim, theta, yarn, exponents.device)
    return (plain * (1 - slowed) + plain / yarn.factor * slowed).float()


def _ramp(dim: int, theta: float, yarn: Yarn, device: torch.device) -> Tensor:
    """Return how far each pair is slowed, from 0 (not) to 1 (by the whole factor), float64 [dim/2]."""

    def pair(turns: float) -> float:
        """Return the (fractional) pair that turns `turns` times over the original length."""
        return dim * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high = min(math.ceil(pair(yarn.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64, device=device)
    return ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every pair's angle, [B, S, R/2] each, to be applied to any number of tensors.

    The angles are float64: in float32 the angle of position 100,000 is off by up to a hundredth.

    Args:
        positions: Integers [B, S].
        frequencies: What `frequencies` returned, [R/2].
        dtype: Dtype of the tensors to be turned. The tables are at least float32.
    """
    wide = accumulator(dtype)
    if wide is torch.float32 and few_rows.takes(frequencies, positions.numel()):
        return few_rows.rotation(positions, frequencies)
    angles = positions.double().unsqueeze(-1) * frequencies.double()  # [B, S, R/2]
    return angles.cos().to(wide), angles.sin().to(wide)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Return `x` [B, S, H, R] with every pair turned, in its dtype and its order of elements.

    Args:
        x: Queries or keys; a key shared by all heads has H = 1.
        cos: Cosines from `rotation`, [B, S, R/2].
        sin: Sines from `rotation`, [B, S, R/2].
        interleaved: Whether pairs are elements (2i, 2i + 1) rather than (i, i + R/2).

    Raises:
        ValueError: The tables need a gradient, which the kernel does not compute.
    """
    if takes_kernel(x):
        return torch.ops.tangram.rotate(x, cos, sin, interleaved)
    if interleaved and few_rows.takes(x, cos.numel() // max(cos.shape[-1], 1), cos, sin):
        return few_rows.rotate(x, cos, sin)
    return _turned(x, cos, sin, interleaved)


def rope(x: Tensor, positions: Tensor, frequencies: Tensor, interleaved: bool = True) -> Tensor:
    """Return `x` [B, S, H, R] turned according to `positions` [B, S], in its dtype.

    Args:
        x: Queries or keys; a key shared by all heads has H = 1.
        positions: Integers [B, S].
        frequencies: What `frequencies` returned, [R/2].
        interleaved: Whether pairs are elements (2i, 2i + 1) rather than (i, i + R/2).
    """
    return rotate(x, *rotation(positions, frequencies, x.dtype), interleaved)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [B, S, 1, R/2]
    wide = x.to(accumulator(x.dtype))
    if interleaved:
        # As complex numbers, because slices of stride two are six times slower. They begin at even places of a storage.
        whole = (
            wide.contiguous() if wide.storage_offset() % 2 == 0 else wide.clone(memory_format=torch.contiguous_format)
        )
        pairs = torch.view_as_complex(whole.view(*x.shape[:-1], x.shape[-1] // 2, 2))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    first, second = wide.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


@triton.jit
def _turn(
    x,
    cos,
    sin,
    y,
    rows,
    pairs,
    positions,
    heads,
    stride_sequence,
    stride_position,
    stride_head,
    stride_column,
    interleaved: tl.constexpr,
    wide: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    # A row is one head of one token.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    token = row // heads
    at = x + token // positions * stride_sequence + token % positions * stride_position + row % heads * stride_head
    out = y + row * 2 * pairs
    pair = tl.arange(0, PAIRS).to(tl.int64)[None, :]
    inside = (row < rows) & (pair < pairs)
    cosine = tl.load(cos + token * pairs + pair, mask=inside, other=0.0).to(wide)
    sine = tl.load(sin + token * pairs + pair, mask=inside, other=0.0).to(wide)
    if interleaved:
        # Read and written side by side and parted in between: memory is slow in strides of two.
        column = tl.arange(0, 2 * PAIRS).to(tl.int64)[None, :]
        whole = (row < rows) & (column < 2 * pairs)
        values = tl.load(at + column * stride_column, mask=whole, other=0.0).to(wide)
        first, second = tl.split(tl.reshape(values, (ROWS, PAIRS, 2)))
        turned = tl.join(first * cosine - second * sine, first * sine + second * cosine)
        tl.store(out + column, tl.reshape(turned, (ROWS, 2 * PAIRS)).to(y.dtype.element_ty), mask=whole)
    else:
        first = tl.load(at + pair * stride_column, mask=inside, other=0.0).to(wide)
        second = tl.load(at + (pair + pairs) * stride_column, mask=inside, other=0.0).to(wide)
        tl.store(out + pair, (first * cosine - second * sine).to(y.dtype.element_ty), mask=inside)
        tl.store(out + pair + pairs, (first * sine + second * cosine).to(y.dtype.element_ty), mask=inside)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    y = x.new_empty(x.shape)
    if x.numel():
        sequences, positions, heads, width = x.shape
        rows, tables = sequences * positions * heads, (sequences, positions, width // 2)
        across = triton.next_power_of_2(width // 2)
        tall = max(_TILE // (2 * across), 1)
        _turn[(triton.cdiv(rows, tall),)](
            x,
            cos.expand(tables).contiguous(),
            sin.expand(tables).contiguous(),
            y,
            rows,
            width // 2,
            positions,
            heads,
            *x.stride(),
            interleaved=interleaved,
            wide=wide_type(x.dtype),
            ROWS=tall,
            PAIRS=across,
        )
    return y


@torch.library.custom_op("tangram::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return (_launch if takes_kernel(x) else _turned)(x, cos, sin, interleaved).contiguous()


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx, inputs, output):
    _, cos, sin, ctx.interleaved = inputs
    if any(ctx.needs_input_grad[1:]):
        raise ValueError(
            "the kernel of rotate has no gradient for its cosines and sines: detach them, or choose the twin with "
            "TANGRAM_KERNELS=reference"
        )
    ctx.save_for_backward(cos, sin)


def _turn_back(ctx, grad):
    cos, sin = ctx.saved_tensors
    return torch.ops.tangram.rotate(grad, cos, -sin, ctx.interleaved), None, None, None


_rotate.register_autograd(_turn_back, setup_context=_keep)

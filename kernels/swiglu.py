"""The gated activation of a feed-forward (arXiv:2002.05202).

With [gate | up] the input and s = 1 / (1 + exp(-gate)),

    y = silu(gate) * up,    silu(gate) = gate s
    dgate = dy * up * (s + silu(gate) (1 - s)),    dup = dy * silu(gate)

In FP8 training y is the input of the next product and of nothing else, so it can leave in FP8 at once.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tangram.kernels import few_rows
from tangram.kernels.backend import takes_kernel
from tangram.kernels.jit import tl, triton, wide_type
from tangram.kernels.products import accumulator
from tangram.kernels.quantize import E4M3, SMALLEST_PEAK, Quantized, largest, quantize_tiles, tile_codes, tile_scales

_TILE = 4096
"""Numbers of y that one program of a kernel computes."""

_WIDTH = 128
"""Columns of a tile that shares a scale."""


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu of the first half of `gate_up` [..., 2 I] times the second half, [..., I], in its dtype.

    It is computed at least in float32; only the result is rounded. Backward keeps the input alone.

    Raises:
        ValueError: The last dimension is odd.
    """
    _check(gate_up)
    if takes_kernel(gate_up):
        return torch.ops.tangram.swiglu(gate_up)
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate_up)
    if few_rows.takes(gate_up, gate_up.numel() // max(gate_up.shape[-1], 1)):
        return few_rows.swiglu(gate_up)
    return _forward(gate_up)


def swiglu_quantized(gate_up: Tensor, power_of_two: bool = False) -> Quantized:
    """Return `swiglu` of `gate_up` [M, 2 I] in E4M3 in tiles of 1 x 128; it has no gradient.

    The kernel does it in one pass. y is rounded to the dtype of `gate_up` in between, so that the codes are those
    of `quantize_tiles(swiglu(gate_up))`.

    Args:
        gate_up: Gates and what they multiply, side by side.
        power_of_two: Round every scale up to a power of two.

    Returns:
        Codes [M, I] and scales float32 [M, ceil(I / 128)].

    Raises:
        ValueError: The last dimension is odd.
    """
    _check(gate_up)
    if takes_kernel(gate_up):
        return Quantized(*torch.ops.tangram.swiglu_quantized(gate_up, power_of_two))
    return quantize_tiles(_forward(gate_up), _WIDTH, power_of_two)


def _check(gate_up: Tensor) -> None:
    width = gate_up.shape[-1]
    if width % 2:
        raise ValueError(f"swiglu needs two halves of one width, but the last dimension is {width}")


def _forward(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(accumulator(gate_up.dtype)).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    wide = accumulator(gate_up.dtype)
    gate, up = gate_up.to(wide).chunk(2, -1)
    grad = grad.to(wide)
    halves = torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
    return torch.cat(halves, -1).to(gate_up.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _backward(grad, *ctx.saved_tensors)


@triton.jit
def _place(rows, columns, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # The rows and columns of y that this program computes, and which of them there are.
    row = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _halves(gate_up, row, column, inside, columns, stride_row, stride_column, wide: tl.constexpr):
    at = gate_up + row * stride_row
    gate = tl.load(at + column * stride_column, mask=inside, other=0.0).to(wide)
    return gate, tl.load(at + (columns + column) * stride_column, mask=inside, other=0.0).to(wide)


@triton.jit
def _gated(
    gate_up,
    y,
    rows,
    columns,
    across,
    stride_row,
    stride_column,
    wide: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = _place(rows, columns, across, ROWS, COLUMNS)
    gate, up = _halves(gate_up, row, column, inside, columns, stride_row, stride_column, wide)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_quantized(
    gate_up,
    codes,
    scales,
    rows,
    columns,
    across,
    stride_row,
    stride_column,
    bound: tl.constexpr,
    smallest: tl.constexpr,
    power_of_two: tl.constexpr,
    wide: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = _place(rows, columns, across, ROWS, COLUMNS)
    gate, up = _halves(gate_up, row, column, inside, columns, stride_row, stride_column, wide)
    result = gate / (1.0 + tl.exp(-gate)) * up
    values = result.to(gate_up.dtype.element_ty).to(tl.float32)
    scale = tile_scales(tl.max(tl.abs(values), 1), bound, smallest, power_of_two)[:, None]
    coded = tile_codes(values, scale, bound)
    tl.store(codes + row * columns + column, coded.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row * across + tl.program_id(0) % across, scale, mask=row < rows)


@triton.jit
def _gated_backward(
    grad,
    gate_up,
    gate_up_grad,
    rows,
    columns,
    across,
    grad_row,
    grad_column,
    stride_row,
    stride_column,
    wide: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = _place(rows, columns, across, ROWS, COLUMNS)
    gate, up = _halves(gate_up, row, column, inside, columns, stride_row, stride_column, wide)
    arriving = tl.load(grad + row * grad_row + column * grad_column, mask=inside, other=0.0).to(wide)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    gate_grad = arriving * up * (sigmoid + silu * (1.0 - sigmoid))
    out = gate_up_grad + row * 2 * columns + column
    tl.store(out, gate_grad.to(gate_up_grad.dtype.element_ty), mask=inside)
    tl.store(out + columns, (arriving * silu).to(gate_up_grad.dtype.element_ty), mask=inside)


def _tile(columns: int) -> tuple[int, int]:
    """Return the rows and columns of a program's tile."""
    width = min(triton.next_power_of_2(columns), 1024)
    return _TILE // width, width


def _launch(gate_up: Tensor) -> Tensor:
    y = _half(gate_up)
    if y.numel():
        flat, columns = gate_up.reshape(-1, gate_up.shape[-1]), y.shape[-1]
        tall, width = _tile(columns)
        across = triton.cdiv(columns, width)
        _gated[(triton.cdiv(len(flat), tall) * across,)](
            flat,
            y,
            len(flat),
            columns,
            across,
            *flat.stride(),
            wide=wide_type(flat.dtype),
            ROWS=tall,
            COLUMNS=width,
        )
    return y


def _launch_quantized(gate_up: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _codes_and_scales(gate_up)
    if codes.numel():
        rows, columns = codes.shape
        across, tall = scales.shape[1], _TILE // _WIDTH
        _gated_quantized[(triton.cdiv(rows, tall) * across,)](
            gate_up,
            codes,
            scales,
            rows,
            columns,
            across,
            *gate_up.stride(),
            bound=largest(E4M3),
            smallest=SMALLEST_PEAK,
            power_of_two=power_of_two,
            wide=wide_type(gate_up.dtype),
            ROWS=tall,
            COLUMNS=_WIDTH,
        )
    return codes, scales


def _launch_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate_up_grad = gate_up.new_empty(gate_up.shape)
    if grad.numel():
        columns = grad.shape[-1]
        flat, flat_grad = gate_up.reshape(-1, 2 * columns), grad.reshape(-1, columns)
        tall, width = _tile(columns)
        across = triton.cdiv(columns, width)
        _gated_backward[(triton.cdiv(len(flat), tall) * across,)](
            flat_grad,
            flat,
            gate_up_grad,
            len(flat),
            columns,
            across,
            *flat_grad.stride(),
            *flat.stride(),
            wide=wide_type(flat.dtype),
            ROWS=tall,
            COLUMNS=width,
        )
    return gate_up_grad


def _half(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _codes_and_scales(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = len(gate_up), gate_up.shape[1] // 2
    codes = torch.empty(rows, columns, dtype=E4M3, device=gate_up.device)
    return codes, torch.empty(rows, -(-columns // _WIDTH), dtype=torch.float32, device=gate_up.device)


@torch.library.custom_op("tangram::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    return _launch(gate_up) if takes_kernel(gate_up) else _forward(gate_up).contiguous()


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return _half(gate_up)


@torch.library.custom_op("tangram::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    return _launch_backward(grad, gate_up) if takes_kernel(gate_up) else _backward(grad, gate_up).contiguous()


@_swiglu_backward.register_fake
def _(grad: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


@torch.library.custom_op("tangram::swiglu_quantized", mutates_args=())
def _swiglu_quantized(gate_up: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if takes_kernel(gate_up):
        return _launch_quantized(gate_up, power_of_two)
    codes, scales = quantize_tiles(_forward(gate_up), _WIDTH, power_of_two)
    return codes, scales


@_swiglu_quantized.register_fake
def _(gate_up: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return _codes_and_scales(gate_up)


_swiglu.register_autograd(
    lambda ctx, grad: torch.ops.tangram.swiglu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

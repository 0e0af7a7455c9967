"""Root-mean-square normalisation (arXiv:1910.07467).

With r = 1 / sqrt(mean(x^2) + eps), n = x r and g = dy * weight,

    y = n * weight,    dx = r (g - n mean(g * n)),    dweight = sum over rows of dy * n
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tangram.kernels import few_rows
from tangram.kernels.backend import takes_kernel
from tangram.kernels.jit import tl, triton, wide_type
from tangram.kernels.products import accumulator

_TILE = 8192
"""Numbers of x that one program of a kernel holds: as many rows, and at least one."""

_PROGRAMS = 264
"""Programs that share the rows of a backward, each with a partial sum of dweight: two for each core of a Hopper GPU."""


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x` [..., D] over its root mean square, times `weight` [D], in the dtype of `x`.

    The statistics and the product with the weight are at least float32; only the result is rounded. Backward
    keeps the arguments and one number a row.
    """
    if takes_kernel(x):
        y, _ = torch.ops.tangram.rmsnorm(x, weight, eps)
        return y
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    if few_rows.takes(x, x.numel() // max(x.shape[-1], 1), weight):
        return few_rows.rmsnorm(x, weight, eps)
    return _forward(x, weight, eps)[0]


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y, and r [..., 1]."""
    wide = x.to(accumulator(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).mul_(weight).to(x.dtype), scale


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and weight, each if it is needed."""
    normed, wide_grad = x * scale, grad.to(scale.dtype)
    per_element = wide_grad * normed  # serves both gradients
    x_grad = weight_grad = None
    if needs[0]:
        mean = (per_element @ weight.to(scale.dtype)).unsqueeze(-1) / x.shape[-1]
        x_grad = (wide_grad * weight).sub_(normed.mul_(mean)).mul_(scale).to(x.dtype)
    if needs[1]:
        weight_grad = per_element.flatten(0, -2).sum(0).to(weight.dtype)
    return x_grad, weight_grad


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        return *_backward(grad, x, weight, scale, ctx.needs_input_grad[:2]), None


@triton.jit
def _norm(
    x,
    weight,
    y,
    scales,
    rows,
    columns,
    stride_row,
    stride_column,
    eps: tl.constexpr,
    wide: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(wide)
    far = row.to(tl.int64)[:, None]
    values = tl.load(x + far * stride_row + column[None, :] * stride_column, mask=inside, other=0.0).to(wide)
    scale = tl.rsqrt(tl.sum(values * values, 1) / columns + eps)
    result = values * scale[:, None] * factor[None, :]
    tl.store(y + far * columns + column[None, :], result.to(y.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit
def _norm_backward(
    grad,
    x,
    weight,
    scales,
    x_grad,
    partial,
    rows,
    columns,
    grad_row,
    grad_column,
    stride_row,
    stride_column,
    wide: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # One program takes every so many rows, and adds up what they give to dweight.
    column = tl.arange(0, COLUMNS).to(tl.int64)
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(wide)
    total = tl.zeros((ROWS, COLUMNS), wide)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        far = row.to(tl.int64)[:, None]
        values = tl.load(x + far * stride_row + column[None, :] * stride_column, mask=inside, other=0.0).to(wide)
        arriving = tl.load(grad + far * grad_row + column[None, :] * grad_column, mask=inside, other=0.0).to(wide)
        scale = tl.load(scales + row, mask=row < rows, other=0.0).to(wide)[:, None]
        normed = values * scale
        total += arriving * normed
        arriving *= factor[None, :]
        mean = tl.sum(arriving * normed, 1) / columns
        result = (arriving - normed * mean[:, None]) * scale
        tl.store(x_grad + far * columns + column[None, :], result.to(x_grad.dtype.element_ty), mask=inside)
    at = tl.program_id(0) * columns + column
    tl.store(partial + at, tl.sum(total, 0), mask=column < columns)


def _tile(columns: int) -> tuple[int, int]:
    """Return the rows and the columns of a tile of whole rows."""
    width = triton.next_power_of_2(columns)
    return max(_TILE // width, 1), width


def _launch(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, scale = _outputs(x)
    if x.numel():
        flat = x.reshape(-1, x.shape[-1])
        tall, width = _tile(flat.shape[1])
        _norm[(triton.cdiv(len(flat), tall),)](
            flat,
            weight.contiguous(),
            y,
            scale,
            *flat.shape,
            *flat.stride(),
            eps=eps,
            wide=wide_type(x.dtype),
            ROWS=tall,
            COLUMNS=width,
            num_warps=8,
        )
    return y, scale


def _launch_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x_grad = x.new_empty(x.shape)
    if not x.numel():
        return x_grad, torch.zeros_like(weight)
    flat, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    tall, width = _tile(flat.shape[1])
    programs = min(triton.cdiv(len(flat), tall), _PROGRAMS)
    partial = torch.empty(programs, flat.shape[1], dtype=scale.dtype, device=x.device)
    _norm_backward[(programs,)](
        flat_grad,
        flat,
        weight.contiguous(),
        scale,
        x_grad,
        partial,
        *flat.shape,
        *flat_grad.stride(),
        *flat.stride(),
        wide=wide_type(x.dtype),
        ROWS=tall,
        COLUMNS=width,
        num_warps=16,
    )
    return x_grad, partial.sum(0).to(weight.dtype)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    return y, torch.empty(*x.shape[:-1], 1, dtype=accumulator(x.dtype), device=x.device)


@torch.library.custom_op("tangram::rmsnorm", mutates_args=())
def _rmsnorm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if takes_kernel(x):
        return _launch(x, weight, eps)
    y, scale = _forward(x, weight, eps)
    return y.contiguous(), scale


@_rmsnorm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _outputs(x)


@torch.library.custom_op("tangram::rmsnorm_backward", mutates_args=())
def _rmsnorm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if takes_kernel(x):
        return _launch_backward(grad, x, weight, scale)
    x_grad, weight_grad = _backward(grad, x, weight, scale, (True, True))
    assert x_grad is not None
    assert weight_grad is not None
    return x_grad.contiguous(), weight_grad


@_rmsnorm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx, grad, _):
    return *torch.ops.tangram.rmsnorm_backward(grad, *ctx.saved_tensors), None


_rmsnorm.register_autograd(_differentiate, setup_context=_keep)

"""Tokens in the order of their experts, and back.

Token n is wanted by K experts: its slots (n, 0) to (n, K - 1). `order_by_expert` gives every slot a row, such
that the rows of an expert are consecutive. With index the token of a row, slots the slot of a row and inverse
the row of a slot,

    permute       rows[m] = x[index[m]]
                  dx[n] = sum_k drows[inverse[n, k]]
    unpermute     y[n] = sum_k gates[n, k] * rows[inverse[n, k]]
                  drows[m] = gates[slots[m]] * dy[index[m]],    dgates[n, k] = rows[inverse[n, k]] . dy[n]

so both directions of both only gather and sum: the order of every sum is fixed, and no two writes meet.

A slot may have no row, where its expert is elsewhere: it is a gap, and counts as nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tangram.kernels import few_rows
from tangram.kernels.backend import takes_kernel
from tangram.kernels.jit import tl, triton, wide_type
from tangram.kernels.products import accumulator

_TILE = 4096
"""Numbers that one program of a kernel reads at a time."""


@dataclass(frozen=True, eq=False)
class Order:
    """Where the slots of N tokens went.

    Attributes:
        index: Token of each row, int64 [N * K].
        inverse: Row of each slot, -1 for a gap, int64 [N, K].
        counts: Rows of each expert, int64 [E].
        slots: Slot of each row, n * K + k, int64 [N * K].
        gaps: Whether there may be gaps; each makes the rows one fewer.
    """

    index: Tensor
    inverse: Tensor
    counts: Tensor
    slots: Tensor
    gaps: bool = False


def order_by_expert(ids: Tensor, n_experts: int, n_rows: int | None = None) -> Order:
    """Return the order in which rows are sorted by expert, and by token within one.

    Args:
        ids: Experts of each token, below `n_experts`, int64 [N, K]; with `n_rows` also -1, a gap.
        n_experts: E.
        n_rows: How many slots are no gaps; by default there are none.
    """
    experts, gaps = ids.flatten(), n_rows is not None
    if not gaps and few_rows.orders(ids):
        return Order(*few_rows.order_by_expert(ids, n_experts))
    if gaps:
        experts = torch.where(experts < 0, n_experts, experts)
    slots = experts.argsort(stable=True)[:n_rows]
    inverse = torch.full_like(experts, -1).scatter_(0, slots, torch.arange(len(slots), device=ids.device))
    counts = torch.zeros(n_experts + gaps, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))  # unlike bincount, this needs no sync
    return Order(slots // max(ids.shape[1], 1), inverse.view_as(ids), counts[:n_experts], slots, gaps)


def permute(x: Tensor, order: Order) -> Tensor:
    """Return one row for each slot of `x` [N, D], in `order`, [N * K, D]."""
    if takes_kernel(x):
        return torch.ops.tangram.permute(x, order.index, order.inverse, order.gaps)
    if not torch.is_grad_enabled():
        return x.index_select(0, order.index)
    return _Permute.apply(x, order.index, order.inverse, order.gaps)


def unpermute(rows: Tensor, gates: Tensor, order: Order) -> Tensor:
    """Return the sum over each token's slots of gate times row, [N, D], in the dtype of `rows`.

    It is accumulated at least in float32, in the order of the slots.

    Args:
        rows: Expert outputs in `order`, [N * K, D].
        gates: Weights [N, K], of any floating dtype.
        order: What `order_by_expert` returned.
    """
    args = rows, gates, order.index, order.inverse, order.slots, order.gaps
    if takes_kernel(rows):
        return torch.ops.tangram.unpermute(*args)
    if torch.is_grad_enabled():
        return _Unpermute.apply(*args)
    if not order.gaps and few_rows.takes(rows, len(rows)):
        return few_rows.unpermute(rows, gates, order.inverse)
    return _collect(rows, order.inverse, gates, order.gaps)


def _closed(rows: Tensor, inverse: Tensor, gaps: bool) -> tuple[Tensor, Tensor]:
    """Return rows [M, ...] and the row of each slot, which for a gap is a further row of zeros."""
    if not gaps:
        return rows, inverse
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]), inverse.remainder(len(rows) + 1)


def _collect(rows: Tensor, inverse: Tensor, gates: Tensor | None = None, gaps: bool = False) -> Tensor:
    """Return the sum over k of rows[inverse[:, k]], weighted by gates[:, k] if given, [N, D].

    One slot at a time: three times as fast as summing a gathered [N, K, D].
    """
    rows, inverse = _closed(rows, inverse, gaps)
    wide = accumulator(rows.dtype)
    total = rows.new_zeros(len(inverse), rows.shape[1], dtype=wide)
    for k in range(inverse.shape[1]):
        part = rows.index_select(0, inverse[:, k])
        if gates is None:
            total += part
        else:
            total.addcmul_(part.to(wide), gates[:, k : k + 1].to(wide))
    return total.to(rows.dtype)


def _unpermute_grads(
    grad: Tensor,
    rows: Tensor,
    gates: Tensor,
    index: Tensor,
    inverse: Tensor,
    slots: Tensor,
    gaps: bool = False,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of rows and gates, each if it is needed."""
    wide = accumulator(rows.dtype)
    per_row = grad.index_select(0, index).to(wide)  # [M, D]
    rows_grad = gates_grad = None
    if needs[1]:
        dots, places = _closed((rows * per_row).sum(-1), inverse, gaps)  # [M]
        gates_grad = dots.index_select(0, places.flatten()).view_as(gates).to(gates.dtype)
    if needs[0]:
        weights = gates.flatten().index_select(0, slots).to(wide)
        rows_grad = per_row.mul_(weights.unsqueeze(1)).to(rows.dtype)
    return rows_grad, gates_grad


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, inverse, gaps):
        ctx.save_for_backward(inverse)
        ctx.gaps = gaps
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return _collect(grad, inverse, gaps=ctx.gaps), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, gates, index, inverse, slots, gaps):
        ctx.save_for_backward(rows, gates, index, inverse, slots)
        ctx.gaps = gaps
        return _collect(rows, inverse, gates, gaps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, gates, index, inverse, slots = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        return *_unpermute_grads(grad, rows, gates, index, inverse, slots, ctx.gaps, needs), None, None, None, None


@triton.jit
def _gather(
    x,
    index,
    y,
    rows,
    columns,
    across,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    source = tl.load(index + row, mask=row < rows, other=0).to(tl.int64)[:, None]
    values = tl.load(x + source * stride_row + column * stride_column, mask=inside)
    tl.store(y + row[:, None] * columns + column, values, mask=inside)


@triton.jit
def _gather_sum(
    rows,
    inverse,
    gates,
    y,
    tokens,
    columns,
    across,
    stride_row,
    stride_column,
    slots: tl.constexpr,
    weighted: tl.constexpr,
    wide: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = (token < tokens)[:, None] & (column < columns)
    total = tl.zeros((ROWS, COLUMNS), wide)
    for k in tl.static_range(slots):
        source = tl.load(inverse + token * slots + k, mask=token < tokens, other=-1).to(tl.int64)[:, None]
        there = inside & (source >= 0)
        values = tl.load(rows + source * stride_row + column * stride_column, mask=there, other=0.0).to(wide)
        if weighted:
            values *= tl.load(gates + token * slots + k, mask=token < tokens, other=0.0).to(wide)[:, None]
        total += values
    tl.store(y + token[:, None] * columns + column, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _weigh_and_dot(
    grad,
    rows,
    gates,
    index,
    slots,
    rows_grad,
    gates_grad,
    length,
    columns,
    grad_row,
    grad_column,
    stride_row,
    stride_column,
    wide: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Every row has its own slot, so that no two programs write one gate's gradient.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.load(index + row, mask=row < length, other=0).to(tl.int64)
    slot = tl.load(slots + row, mask=row < length, other=0).to(tl.int64)
    gate = tl.load(gates + slot, mask=row < length, other=0.0).to(wide)
    total = tl.zeros((ROWS, COLUMNS), wide)
    for first in range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        inside = (row < length)[:, None] & (column < columns)
        at = grad + token[:, None] * grad_row + column * grad_column
        arriving = tl.load(at, mask=inside, other=0.0).to(wide)
        at = rows + row[:, None] * stride_row + column * stride_column
        total += tl.load(at, mask=inside, other=0.0).to(wide) * arriving
        result = (gate[:, None] * arriving).to(rows_grad.dtype.element_ty)
        tl.store(rows_grad + row[:, None] * columns + column, result, mask=inside)
    tl.store(gates_grad + slot, tl.sum(total, 1).to(gates_grad.dtype.element_ty), mask=row < length)


def _tile(columns: int) -> tuple[int, int]:
    """Return the rows and columns of a program's tile."""
    width = min(triton.next_power_of_2(columns), 1024)
    return _TILE // width, width


def _launch_gather(x: Tensor, index: Tensor) -> Tensor:
    y = x.new_empty(len(index), x.shape[1])
    if y.numel():
        tall, width = _tile(x.shape[1])
        across = triton.cdiv(x.shape[1], width)
        _gather[(triton.cdiv(len(index), tall) * across,)](
            x, index.contiguous(), y, *y.shape, across, *x.stride(), ROWS=tall, COLUMNS=width
        )
    return y


def _launch_sum(rows: Tensor, inverse: Tensor, gates: Tensor | None = None) -> Tensor:
    tokens, slots = inverse.shape
    y = rows.new_empty(tokens, rows.shape[1])
    if y.numel():
        tall, width = _tile(rows.shape[1])
        across = triton.cdiv(rows.shape[1], width)
        _gather_sum[(triton.cdiv(tokens, tall) * across,)](
            rows,
            inverse.contiguous(),
            rows if gates is None else gates.contiguous(),
            y,
            *y.shape,
            across,
            *rows.stride(),
            slots=slots,
            weighted=gates is not None,
            wide=wide_type(rows.dtype),
            ROWS=tall,
            COLUMNS=width,
        )
    return y


def _launch_backward(
    grad: Tensor, rows: Tensor, gates: Tensor, index: Tensor, slots: Tensor, gaps: bool
) -> tuple[Tensor, Tensor]:
    rows_grad = rows.new_empty(rows.shape)
    if not rows.numel():
        return rows_grad, gates.new_zeros(gates.shape)
    gates_grad = gates.new_zeros(gates.shape) if gaps else gates.new_empty(gates.shape)
    tall, width = _tile(rows.shape[1])
    _weigh_and_dot[(triton.cdiv(len(rows), tall),)](
        grad,
        rows,
        gates.contiguous(),
        index.contiguous(),
        slots.contiguous(),
        rows_grad,
        gates_grad,
        *rows.shape,
        *grad.stride(),
        *rows.stride(),
        wide=wide_type(rows.dtype),
        ROWS=tall,
        COLUMNS=width,
    )
    return rows_grad, gates_grad


@torch.library.custom_op("tangram::permute", mutates_args=())
def _permute(x: Tensor, index: Tensor, inverse: Tensor, gaps: bool) -> Tensor:
    return _launch_gather(x, index) if takes_kernel(x) else x.index_select(0, index)


@_permute.register_fake
def _(x: Tensor, index: Tensor, inverse: Tensor, gaps: bool) -> Tensor:
    return x.new_empty(len(index), x.shape[1])


@torch.library.custom_op("tangram::permute_backward", mutates_args=())
def _permute_backward(grad: Tensor, inverse: Tensor, gaps: bool) -> Tensor:
    return _launch_sum(grad, inverse) if takes_kernel(grad) else _collect(grad, inverse, gaps=gaps)


@_permute_backward.register_fake
def _(grad: Tensor, inverse: Tensor, gaps: bool) -> Tensor:
    return grad.new_empty(len(inverse), grad.shape[1])


@torch.library.custom_op("tangram::unpermute", mutates_args=())
def _unpermute(rows: Tensor, gates: Tensor, index: Tensor, inverse: Tensor, slots: Tensor, gaps: bool) -> Tensor:
    return _launch_sum(rows, inverse, gates) if takes_kernel(rows) else _collect(rows, inverse, gates, gaps)


@_unpermute.register_fake
def _(rows: Tensor, gates: Tensor, index: Tensor, inverse: Tensor, slots: Tensor, gaps: bool) -> Tensor:
    return rows.new_empty(len(inverse), rows.shape[1])


@torch.library.custom_op("tangram::unpermute_backward", mutates_args=())
def _unpermute_backward(
    grad: Tensor, rows: Tensor, gates: Tensor, index: Tensor, inverse: Tensor, slots: Tensor, gaps: bool
) -> tuple[Tensor, Tensor]:
    if takes_kernel(rows):
        return _launch_backward(grad, rows, gates, index, slots, gaps)
    rows_grad, gates_grad = _unpermute_grads(grad, rows, gates, index, inverse, slots, gaps)
    assert rows_grad is not None
    assert gates_grad is not None
    return rows_grad, gates_grad


@_unpermute_backward.register_fake
def _(
    grad: Tensor, rows: Tensor, gates: Tensor, index: Tensor, inverse: Tensor, slots: Tensor, gaps: bool
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), gates.new_empty(gates.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.gaps = inputs
    ctx.save_for_backward(*tensors)


def _keep_inverse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, inverse, ctx.gaps = inputs
    ctx.save_for_backward(inverse)


_permute.register_autograd(
    lambda ctx, grad: (torch.ops.tangram.permute_backward(grad, *ctx.saved_tensors, ctx.gaps), None, None, None),
    setup_context=_keep_inverse,
)
_unpermute.register_autograd(
    lambda ctx, grad: (
        *torch.ops.tangram.unpermute_backward(grad, *ctx.saved_tensors, ctx.gaps),
        None,
        None,
        None,
        None,
    ),
    setup_context=_keep,
)

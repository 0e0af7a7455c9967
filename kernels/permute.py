"""Tokens in the order of their experts, and back.

Token n is wanted by K experts: its slots (n, 0) to (n, K - 1). `order_by_expert` gives every slot a row, such
that the rows of an expert are consecutive. With index the token of a row, slots the slot of a row and inverse
the row of a slot,

    permute       rows[m] = x[index[m]]
                  dx[n] = sum_k drows[inverse[n, k]]
    unpermute     y[n] = sum_k gates[n, k] * rows[inverse[n, k]]
                  drows[m] = gates[slots[m]] * dy[index[m]],    dgates[n, k] = rows[inverse[n, k]] . dy[n]

so both directions of both only gather and sum: the order of every sum is fixed, and no two writes meet.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tangram.kernels.products import accumulator


@dataclass(frozen=True, eq=False)
class Order:
    """Where the slots of N tokens went.

    Attributes:
        index: Token of each row, int64 [N * K].
        inverse: Row of each slot, int64 [N, K].
        counts: Rows of each expert, int64 [E].
        slots: Slot of each row, n * K + k, int64 [N * K].
    """

    index: Tensor
    inverse: Tensor
    counts: Tensor
    slots: Tensor


def order_by_expert(ids: Tensor, n_experts: int) -> Order:
    """Return the order in which rows are sorted by expert, and by token within one.

    Args:
        ids: Experts of each token, below `n_experts`, int64 [N, K].
        n_experts: E.
    """
    experts = ids.flatten()
    slots = experts.argsort(stable=True)
    inverse = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=ids.device))
    counts = torch.zeros(n_experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))  # unlike bincount, this needs no sync
    return Order(slots // max(ids.shape[1], 1), inverse.view_as(ids), counts, slots)


def permute(x: Tensor, order: Order) -> Tensor:
    """Return one row for each slot of `x` [N, D], in `order`, [N * K, D]."""
    return _Permute.apply(x, order.index, order.inverse)


def unpermute(rows: Tensor, gates: Tensor, order: Order) -> Tensor:
    """Return the sum over each token's slots of gate times row, [N, D], in the dtype of `rows`.

    It is accumulated at least in float32, in the order of the slots.

    Args:
        rows: Expert outputs in `order`, [N * K, D].
        gates: Weights [N, K], of any floating dtype.
        order: What `order_by_expert` returned.
    """
    args = rows, gates, order.index, order.inverse, order.slots
    return _Unpermute.apply(*args)


def _collect(rows: Tensor, inverse: Tensor, gates: Tensor | None = None) -> Tensor:
    """Return the sum over k of rows[inverse[:, k]], weighted by gates[:, k] if given, [N, D].

    One slot at a time: three times as fast as summing a gathered [N, K, D].
    """
    wide = accumulator(rows.dtype)
    total = rows.new_zeros(len(inverse), rows.shape[1], dtype=wide)
    for k in range(inverse.shape[1]):
        part = rows.index_select(0, inverse[:, k])
        if gates is None:
            total += part
        else:
            total.addcmul_(part.to(wide), gates[:, k : k + 1].to(wide))
    return total.to(rows.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return _collect(grad, inverse), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, gates, index, inverse, slots):
        ctx.save_for_backward(rows, gates, index, inverse, slots)
        return _collect(rows, inverse, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, gates, index, inverse, slots = ctx.saved_tensors
        wide = accumulator(rows.dtype)
        per_row = grad.index_select(0, index).to(wide)  # [M, D]
        rows_grad = gates_grad = None
        if ctx.needs_input_grad[1]:
            dots = (rows * per_row).sum(-1)  # [M]
            gates_grad = dots.index_select(0, inverse.flatten()).view_as(gates).to(gates.dtype)
        if ctx.needs_input_grad[0]:
            weights = gates.flatten().index_select(0, slots).to(wide)
            rows_grad = per_row.mul_(weights.unsqueeze(1)).to(rows.dtype)
        return rows_grad, gates_grad, None, None, None

"""One matrix product per expert, over rows that are sorted by expert.

With R_e the rows of expert e, W_e its matrix [N, K] and G_e the gradient at its outputs:

    forward        Y_e = R_e W_e^T        [rows of e, N]
    input grad     dR_e = G_e W_e         [rows of e, K]
    weight grad    dW_e = G_e^T R_e       [N, K], zero for an expert without rows

The three products are functions of their own, so that the last can be deferred. Each is one fused grouped
product where torch has it (float32 and bfloat16 in widths of whole 16 bytes), else one product an expert.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tangram.kernels.products import product_dtype


def grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return every expert's rows times its transposed matrix, [M, N], differentiable in rows and weight.

    Args:
        rows: Rows sorted by expert, [M, K].
        weight: One matrix for each expert, [E, N, K], in the dtype of `rows`.
        counts: Rows of each expert, summing to M, int64 [E].

    Raises:
        ValueError: The dtypes differ, or the counts do not fit.
    """
    return _GroupedMatmul.apply(rows, weight, counts)


def grouped_matmul_loop(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return what `grouped_matmul` does, by one product an expert; differentiable, in any dtype."""
    parts = torch.split(rows, counts.tolist())
    # unbind, not weight[e]: the gradient of an index is a zero tensor as large as all experts.
    return torch.cat([part @ matrix.t() for part, matrix in zip(parts, weight.unbind(0), strict=True)])


def grouped_matmul_forward(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return the outputs [M, N] of rows [M, K] and weight [E, N, K]; not differentiable.

    Raises:
        ValueError: The dtypes differ, or the counts do not fit.
    """
    return _rows_product(rows, weight.contiguous().transpose(1, 2), counts)


def grouped_matmul_input_grad(grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return the gradient [M, K] at the rows, given the one at the outputs [M, N] and weight [E, N, K].

    Raises:
        ValueError: The dtypes differ, or the counts do not fit.
    """
    return _rows_product(grad, weight.contiguous(), counts)


def grouped_matmul_weight_grad(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Return the gradient [E, N, K] at the weight, given the one at the outputs [M, N] and rows [M, K].

    Raises:
        ValueError: The dtypes differ, or the counts do not fit.
    """
    _check(grad, rows, counts)
    dtype = product_dtype(rows)
    left, right = grad.to(dtype).contiguous(), rows.to(dtype).contiguous()
    if _fuses(left) and _fuses(right):
        product = F.grouped_mm(left.t(), right, offs=_offsets(counts))
    else:
        sizes = counts.tolist()
        pairs = zip(torch.split(left, sizes), torch.split(right, sizes), strict=True)
        product = torch.stack([g.t() @ r for g, r in pairs])
    return product.to(rows.dtype)


def _rows_product(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Return the rows [M, I] of each expert times its matrix, of [E, I, O], as [M, O]."""
    _check(rows, matrices, counts)
    if len(counts) != len(matrices):
        raise ValueError(f"counts are for {len(counts)} experts, but the weight has {len(matrices)}")
    dtype = product_dtype(rows)
    left, right = rows.to(dtype).contiguous(), matrices.to(dtype)
    if _fuses(left) and _fuses(right) and _fuses(right.transpose(1, 2)):
        product = F.grouped_mm(left, right, offs=_offsets(counts))
    else:
        product = grouped_matmul_loop(left, right.transpose(1, 2), counts)
    return product.to(rows.dtype)


def _fuses(operand: Tensor) -> bool:
    """Return whether `F.grouped_mm` takes an operand of this dtype and width: whole 16 bytes a row."""
    known = operand.dtype in (torch.float32, torch.bfloat16)
    return known and operand.shape[-1] * operand.element_size() % 16 == 0


def _offsets(counts: Tensor) -> Tensor:
    """Return the row after each expert's last, int32 [E]."""
    return counts.cumsum(0, dtype=torch.int32)


def _check(left: Tensor, right: Tensor, counts: Tensor) -> None:
    """Refuse what the fused product would answer with unwritten memory, where looking costs no sync."""
    if left.dtype is not right.dtype:
        raise ValueError(f"a grouped product of {left.dtype} and {right.dtype}; cast one to the other's dtype")
    if counts.device.type == "cpu" and int(counts.sum()) != len(left):
        raise ValueError(f"counts sum to {int(counts.sum())}, but there are {len(left)} rows")


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, counts):
        ctx.save_for_backward(rows, weight, counts)
        return grouped_matmul_forward(rows, weight, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight, counts = ctx.saved_tensors
        rows_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            rows_grad = grouped_matmul_input_grad(grad, weight, counts)
        if ctx.needs_input_grad[1]:
            weight_grad = grouped_matmul_weight_grad(grad, rows, counts)
        return rows_grad, weight_grad, None

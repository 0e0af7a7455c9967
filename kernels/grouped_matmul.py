"""One matrix product per expert, over rows that are sorted by expert.

With R_e the rows of expert e, W_e its matrix [N, K] and G_e the gradient at its outputs:

    forward        Y_e = R_e W_e^T        [rows of e, N]
    input grad     dR_e = G_e W_e         [rows of e, K]
    weight grad    dW_e = G_e^T R_e       [N, K], zero for an expert without rows

The three products are functions of their own, so that the last can be deferred. On a CPU each is one fused grouped
product where torch has it (float32 and bfloat16 in widths of whole 16 bytes), else one product an expert. The Triton
kernels take float32, which they multiply in full, bfloat16 and float16, in any layout, and sum in float32.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tangram.kernels import few_rows
from tangram.kernels.backend import takes_kernel
from tangram.kernels.blocks import block_of, expert_of, most_blocks, rows_of
from tangram.kernels.jit import tl, triton
from tangram.kernels.products import accumulator, product_dtype


def grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return every expert's rows times its transposed matrix, [M, N], differentiable in rows and weight.

    Args:
        rows: Rows sorted by expert, [M, K].
        weight: One matrix for each expert, [E, N, K], in the dtype of `rows`.
        counts: Rows of each expert, summing to M, int64 [E].

    Raises:
        ValueError: The dtypes differ, the kernel does not take them, or the counts do not fit.
    """
    if takes_kernel(rows):
        return torch.ops.tangram.grouped_matmul(rows, weight, counts)
    return _GroupedMatmul.apply(rows, weight, counts)


def grouped_matmul_loop(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return what `grouped_matmul` does, by one product an expert; differentiable, in any dtype."""
    parts = torch.split(rows, counts.tolist())
    # unbind, not weight[e]: the gradient of an index is a zero tensor as large as all experts.
    return torch.cat([part @ matrix.t() for part, matrix in zip(parts, weight.unbind(0), strict=True)])


def grouped_matmul_forward(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return the outputs [M, N] of rows [M, K] and weight [E, N, K]; not differentiable.

    Raises:
        ValueError: The dtypes differ, the kernel does not take them, or the counts do not fit.
    """
    if takes_kernel(rows):
        return torch.ops.tangram.grouped_matmul(rows, weight, counts)
    if few_rows.takes(rows, len(rows)):
        _check_shapes(rows, weight.mT, counts)
        return few_rows.grouped_matmul(rows, weight, counts)
    return _rows_product(rows, weight.contiguous().transpose(1, 2), counts)


def grouped_matmul_input_grad(grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return the gradient [M, K] at the rows, given the one at the outputs [M, N] and weight [E, N, K].

    Raises:
        ValueError: The dtypes differ, the kernel does not take them, or the counts do not fit.
    """
    if takes_kernel(grad):
        return torch.ops.tangram.grouped_matmul_input_grad(grad, weight, counts)
    return _rows_product(grad, weight.contiguous(), counts)


def grouped_matmul_weight_grad(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Return the gradient [E, N, K] at the weight, given the one at the outputs [M, N] and rows [M, K].

    Raises:
        ValueError: The dtypes differ, the kernel does not take them, or the counts do not fit.
    """
    if takes_kernel(grad):
        return torch.ops.tangram.grouped_matmul_weight_grad(grad, rows, counts)
    return _weight_product(grad, rows, counts)


def columns_product(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """Return left [N, M] times right [M, K] over each expert's share of M, [E, N, K], by plain torch.

    Args:
        left: Its rows or its columns are contiguous.
        right: Likewise, in the dtype of `left`.
        counts: Shares of the experts, summing to M, int64 [E].
    """
    if left.numel() and _fuses(left.dtype, max(left.stride()), max(right.stride()), right.shape[1]):
        return F.grouped_mm(left, right, offs=_offsets(counts))
    sizes = counts.tolist()
    pairs = zip(torch.split(left, sizes, 1), torch.split(right, sizes), strict=True)
    return torch.stack([one @ other for one, other in pairs])


def check_counts(counts: Tensor, rows: int) -> None:
    """Refuse counts that do not sum to `rows`, where looking costs no sync.

    Raises:
        ValueError: They do not.
    """
    if counts.device.type == "cpu" and int(counts.sum()) != rows:
        raise ValueError(f"counts sum to {int(counts.sum())}, but there are {rows} rows")


def _rows_product(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Return the rows [M, I] of each expert times its matrix, of [E, I, O], as [M, O]."""
    _check_rows(rows, matrices, counts)
    dtype = product_dtype(rows)
    left, right = rows.to(dtype).contiguous(), matrices.to(dtype)
    if rows.is_meta:  # without memory the counts say nothing: all rows are one expert's
        product = left @ right[0]
    elif left.numel() and _fuses(dtype, left.stride(0), *right.shape[1:]):
        product = F.grouped_mm(left, right, offs=_offsets(counts))
    else:
        product = grouped_matmul_loop(left, right.transpose(1, 2), counts)
    return product.to(rows.dtype)


def _weight_product(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    _check_columns(grad, rows, counts)
    dtype = product_dtype(rows)
    left, right = grad.to(dtype).contiguous(), rows.to(dtype).contiguous()
    return columns_product(left.t(), right, counts).to(rows.dtype)


def _fuses(dtype: torch.dtype, *widths: int) -> bool:
    """Return whether `F.grouped_mm` takes operands of this dtype and these row strides: whole 16 bytes each."""
    known = dtype in (torch.float32, torch.bfloat16)
    return known and all(width and width * dtype.itemsize % 16 == 0 for width in widths)


def _offsets(counts: Tensor) -> Tensor:
    """Return the row after each expert's last, int32 [E]."""
    return counts.cumsum(0, dtype=torch.int32)


def _check_rows(rows: Tensor, matrices: Tensor, counts: Tensor) -> None:
    _check_shapes(rows, matrices, counts)
    check_counts(counts, len(rows))


def _check_shapes(rows: Tensor, matrices: Tensor, counts: Tensor) -> None:
    _check_dtypes(rows, matrices)
    if len(counts) != len(matrices):
        raise ValueError(f"counts are for {len(counts)} experts, but the weight has {len(matrices)}")
    if rows.shape[1] != matrices.shape[1]:
        raise ValueError(f"rows of width {rows.shape[1]} and matrices for a width of {matrices.shape[1]}")


def _check_columns(grad: Tensor, rows: Tensor, counts: Tensor) -> None:
    _check_dtypes(grad, rows)
    check_counts(counts, len(grad))
    if len(grad) != len(rows):
        raise ValueError(f"a gradient at {len(grad)} rows, but there are {len(rows)}")


def _check_dtypes(left: Tensor, right: Tensor) -> None:
    if left.dtype is not right.dtype:
        raise ValueError(f"a grouped product of {left.dtype} and {right.dtype}; cast one to the other's dtype")


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, counts):
        ctx.save_for_backward(rows, weight, counts)
        return grouped_matmul_forward(rows, weight, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gradients(ctx, grad, grouped_matmul_input_grad, grouped_matmul_weight_grad)


def _gradients(ctx, grad, input_grad, weight_grad):
    rows, weight, counts = ctx.saved_tensors
    at_rows = input_grad(grad, weight, counts) if ctx.needs_input_grad[0] else None
    at_weight = weight_grad(grad, rows, counts) if ctx.needs_input_grad[1] else None
    return at_rows, at_weight, None


@triton.jit
def _rows_kernel(
    rows,
    matrices,
    out,
    counts,
    experts,
    down,
    inputs,
    outputs,
    rows_stride,
    rows_step,
    matrix_stride,
    matrix_step,
    matrix_column,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    # One program computes ROWS rows of one expert, in COLUMNS columns.
    block_row, block_column = block_of(tl.program_id(0), down, tl.cdiv(outputs, COLUMNS), GROUP)
    expert, first, end = expert_of(block_row, counts, experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    inner = tl.arange(0, DEPTH)
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    column = block_column * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < end, column < outputs
    left_at = rows + row[:, None] * rows_stride + inner[None, :] * rows_step
    matrix = matrices + expert.to(tl.int64) * matrix_stride
    right_at = matrix + inner[:, None] * matrix_step + column[None, :] * matrix_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, tl.cdiv(inputs, DEPTH)):
        inside = inner < inputs - step * DEPTH
        left = tl.load(left_at, mask=row_inside[:, None] & inside[None, :], other=0.0)
        right = tl.load(right_at, mask=inside[:, None] & column_inside[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        left_at += DEPTH * rows_step
        right_at += DEPTH * matrix_step
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(out + row[:, None] * outputs + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_kernel(
    grad,
    rows,
    out,
    counts,
    experts,
    outputs,
    inputs,
    grad_stride,
    grad_column,
    rows_stride,
    rows_column,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    # One program computes a block of one expert's gradient, summing over the expert's rows.
    expert = tl.program_id(1)
    start, size = rows_of(expert, counts, experts, EXPERTS)
    down, across = tl.cdiv(outputs, ROWS), tl.cdiv(inputs, COLUMNS)
    block_row, block_column = block_of(tl.program_id(0), down, across, GROUP)
    inner = tl.arange(0, DEPTH)
    row = block_row * ROWS + tl.arange(0, ROWS)
    column = block_column * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < outputs, column < inputs
    here = (start + inner).to(tl.int64)
    left_at = grad + row[:, None] * grad_column + here[None, :] * grad_stride
    right_at = rows + here[:, None] * rows_stride + column[None, :] * rows_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, tl.cdiv(size, DEPTH)):
        inside = inner < size - step * DEPTH
        left = tl.load(left_at, mask=row_inside[:, None] & inside[None, :], other=0.0)
        right = tl.load(right_at, mask=inside[:, None] & column_inside[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        left_at += DEPTH * grad_stride
        right_at += DEPTH * rows_stride
    at = out + expert.to(tl.int64) * outputs * inputs + row[:, None].to(tl.int64) * inputs + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


def _launch_rows(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Multiply as `_rows_product` does, operands of any strides."""
    _check_rows(rows, matrices, counts)
    blocks = _blocks(rows.dtype)
    experts, inputs, outputs = matrices.shape
    down = most_blocks(len(rows), experts, blocks["ROWS"])
    out = rows.new_empty(len(rows), outputs)
    if out.numel():
        _rows_kernel[(down * -(-outputs // blocks["COLUMNS"]),)](
            rows,
            matrices,
            out,
            counts.contiguous(),
            experts,
            down,
            inputs,
            outputs,
            *rows.stride(),
            *matrices.stride(),
            EXPERTS=triton.next_power_of_2(experts),
            **blocks,
        )
    return out


def _launch_weight(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Multiply as `_weight_product` does, operands of any strides."""
    _check_columns(grad, rows, counts)
    blocks = _blocks(rows.dtype)
    experts, outputs, inputs = len(counts), grad.shape[1], rows.shape[1]
    out = rows.new_empty(experts, outputs, inputs)
    if out.numel():
        _weight_kernel[(-(-outputs // blocks["ROWS"]) * -(-inputs // blocks["COLUMNS"]), experts)](
            grad,
            rows,
            out,
            counts.contiguous(),
            experts,
            outputs,
            inputs,
            *grad.stride(),
            *rows.stride(),
            EXPERTS=triton.next_power_of_2(experts),
            **blocks,
        )
    return out


def _blocks(dtype: torch.dtype) -> dict[str, int]:
    """Return the sides of a block: float32 is not for the tensor cores, and its blocks have to fit the registers."""
    if accumulator(dtype) is not torch.float32:
        raise ValueError(f"the Triton kernel does not multiply {dtype}; TANGRAM_KERNELS=reference does")
    if dtype is torch.float32:
        return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "GROUP": 8, "num_warps": 4, "num_stages": 3}
    return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


@torch.library.custom_op("tangram::grouped_matmul", mutates_args=())
def _grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if takes_kernel(rows):
        return _launch_rows(rows, weight.transpose(1, 2), counts)
    return _rows_product(rows, weight.contiguous().transpose(1, 2), counts)


@_grouped_matmul.register_fake
def _(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weight.shape[1])


@torch.library.custom_op("tangram::grouped_matmul_input_grad", mutates_args=())
def _grouped_matmul_input_grad(grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return (_launch_rows if takes_kernel(grad) else _rows_product)(grad, weight, counts)


@_grouped_matmul_input_grad.register_fake
def _(grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return grad.new_empty(len(grad), weight.shape[2])


@torch.library.custom_op("tangram::grouped_matmul_weight_grad", mutates_args=())
def _grouped_matmul_weight_grad(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    return (_launch_weight if takes_kernel(grad) else _weight_product)(grad, rows, counts)


@_grouped_matmul_weight_grad.register_fake
def _(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(len(counts), grad.shape[1], rows.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    ops = torch.ops.tangram
    return _gradients(ctx, grad, ops.grouped_matmul_input_grad, ops.grouped_matmul_weight_grad)


_grouped_matmul.register_autograd(_backward, setup_context=_save)

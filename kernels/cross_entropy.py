"""The head's product and the cross entropy in one, without ever holding the logits of all tokens.

With logits z_n = W x_n and p_n = softmax(z_n), over the N tokens whose target t_n is not ignored,

    loss = scale * sum_n -log p_n[t_n]
    dz_n = scale * (p_n - onehot(t_n)),    dx_n = W^T dz_n,    dW = sum_n dz_n x_n^T

Both gradients are linear in what arrives at the loss, so they are taken while a chunk's logits are there. The
kernel goes twice over a row of logits: first for its largest z and the sum of exp(z_v - largest), kept up to date
block by block, and then to write dz over z.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tangram.kernels.backend import takes_kernel
from tangram.kernels.jit import tl, triton, wide_type
from tangram.kernels.products import accumulator, product_dtype

_BLOCK = 8192
"""Logits that one program of the kernel holds at once."""


class CrossEntropy(NamedTuple):
    """A loss and its gradients.

    Attributes:
        loss: Scalar, at least float32.
        x_grad: Gradient at the hidden states in their dtype, [N, D]; None if not asked for.
        weight_grad: Gradient at the weight, at least float32, [V, D]; None if not asked for.
    """

    loss: Tensor
    x_grad: Tensor | None
    weight_grad: Tensor | None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float,
    *,
    ignore: int = -100,
    chunk: int = 512,
    gradients: bool,
) -> CrossEntropy:
    """Return `scale` times the summed cross entropy of the logits x W^T, and its gradients; no autograd node.

    Logits are products in the dtype of `x`, everything after them is at least float32. The largest thing held
    beside the results is one chunk of logits.

    Args:
        x: Hidden states [N, D].
        weight: The head W in the dtype of `x`, [V, D].
        targets: int64 [N].
        scale: Factor on the sum, usually one over the global number of targets.
        ignore: The target at which a row contributes nothing.
        chunk: Rows whose logits are held at once.
        gradients: Whether to take the gradients in the same pass.

    Raises:
        ValueError: The dtypes differ, or `chunk` is not positive.
    """
    if x.dtype is not weight.dtype:
        raise ValueError(f"hidden states are {x.dtype} and the head is {weight.dtype}; cast one to the other's dtype")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it is the number of rows taken at once, at least 1")
    with torch.no_grad():
        wide, product = accumulator(x.dtype), product_dtype(x)
        head, kernel = weight.to(product), takes_kernel(x)
        loss = torch.zeros((), dtype=wide, device=x.device)
        x_grad = torch.empty_like(x) if gradients else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if gradients else None
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            rows = x[part].to(product)
            if kernel:
                logits_grad = rows @ head.t()  # [chunk, V], logits as yet
                losses = torch.ops.tangram.cross_entropy_rows(logits_grad, targets[part], scale, ignore, gradients)
            else:
                logits_grad = (rows @ head.t()).to(wide).log_softmax(-1)  # log p as yet
                losses = _rows(logits_grad, targets[part], scale, ignore, gradients)
            loss += losses.sum() * scale
            if x_grad is not None and weight_grad is not None:
                logits_grad = logits_grad.to(product)
                x_grad[part] = logits_grad @ head
                _add_product(weight_grad, logits_grad, rows)
    return CrossEntropy(loss, x_grad, weight_grad)


def _rows(log_p: Tensor, targets: Tensor, scale: float, ignore: int, gradients: bool) -> Tensor:
    """Return -log p[t] of every row of log_p [R, V], [R], and write over log_p the gradient if asked for.

    It is the gradient of `scale` times the sum, at the logits.
    """
    kept = (targets != ignore).unsqueeze(1)
    target = targets.unsqueeze(1).masked_fill(~kept, 0)
    losses = log_p.gather(1, target).masked_fill(~kept, 0).neg_()[:, 0]
    if gradients:
        grad = log_p.exp_()
        grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
        grad.mul_(kept.to(grad.dtype) * scale)  # a bool times a float would be float32
    return losses


def _add_product(total: Tensor, logits_grad: Tensor, rows: Tensor) -> None:
    """Add logits_grad^T rows, of [C, V] and [C, D], to `total` [V, D]."""
    if rows.dtype is total.dtype:
        total.addmm_(logits_grad.t(), rows)
    else:
        total += logits_grad.t() @ rows


@triton.jit
def _row(
    logits,
    targets,
    scales,
    losses,
    columns,
    ignore,
    stride_row,
    stride_column,
    gradients: tl.constexpr,
    wide: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)
    logits += row * stride_row
    target = tl.load(targets + row).to(tl.int64)
    kept = target != ignore
    # Read before the reductions, behind which all threads wait: afterwards the gradient is written over it.
    chosen = tl.load(logits + target * stride_column, mask=kept, other=0.0).to(wide)
    largest = tl.full((), float("-inf"), wide)
    total = tl.zeros((), wide)
    for start in range(0, columns, BLOCK):
        inside = start + column < columns
        z = tl.load(logits + (start + column) * stride_column, mask=inside, other=float("-inf")).to(wide)
        higher = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), 0)
        largest = higher
    loss = largest - chosen + tl.log(total)
    tl.store(losses + row, tl.where(kept, loss, 0.0))
    if gradients:
        factor = tl.where(kept, tl.load(scales).to(wide), 0.0)
        for start in range(0, columns, BLOCK):
            inside = start + column < columns
            at = logits + (start + column) * stride_column
            z = tl.load(at, mask=inside, other=float("-inf")).to(wide)
            p = tl.exp(z - largest) / total
            grad = factor * tl.where(start + column == target, p - 1.0, p)
            tl.store(at, grad.to(logits.dtype.element_ty), mask=inside)


def _launch(logits: Tensor, targets: Tensor, scale: float, ignore: int, gradients: bool) -> Tensor:
    losses = _losses(logits)
    if logits.numel():
        _row[(len(logits),)](
            logits,
            targets.contiguous(),
            losses.new_full((), scale),
            losses,
            logits.shape[1],
            ignore,
            *logits.stride(),
            gradients=gradients,
            wide=wide_type(logits.dtype),
            BLOCK=min(triton.next_power_of_2(logits.shape[1]), _BLOCK),
            num_warps=16,
        )
    return losses


def _losses(logits: Tensor) -> Tensor:
    return torch.empty(len(logits), dtype=accumulator(logits.dtype), device=logits.device)


@torch.library.custom_op("tangram::cross_entropy_rows", mutates_args=("logits",))
def _cross_entropy_rows(logits: Tensor, targets: Tensor, scale: float, ignore: int, gradients: bool) -> Tensor:
    if takes_kernel(logits):
        return _launch(logits, targets, scale, ignore, gradients)
    log_p = logits.to(accumulator(logits.dtype)).log_softmax(-1)
    losses = _rows(log_p, targets, scale, ignore, gradients)
    if gradients:
        logits.copy_(log_p)
    return losses


@_cross_entropy_rows.register_fake
def _(logits: Tensor, targets: Tensor, scale: float, ignore: int, gradients: bool) -> Tensor:
    return _losses(logits)

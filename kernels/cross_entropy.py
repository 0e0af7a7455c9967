"""The head's product and the cross entropy in one, without ever holding the logits of all tokens.

With logits z_n = W x_n and p_n = softmax(z_n), over the N tokens whose target t_n is not ignored,

    loss = scale * sum_n -log p_n[t_n]
    dz_n = scale * (p_n - onehot(t_n)),    dx_n = W^T dz_n,    dW = sum_n dz_n x_n^T

Both gradients are linear in what arrives at the loss, so they are taken while a chunk's logits are there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tangram.kernels.products import accumulator, product_dtype


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
        head = weight.to(product)
        loss = torch.zeros((), dtype=wide, device=x.device)
        x_grad = torch.empty_like(x) if gradients else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if gradients else None
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            rows = x[part].to(product)
            log_p = (rows @ head.t()).to(wide).log_softmax(-1)  # [chunk, V]
            kept = (targets[part] != ignore).unsqueeze(1)
            target = targets[part].unsqueeze(1).masked_fill(~kept, 0)
            loss -= log_p.gather(1, target).masked_fill(~kept, 0).sum() * scale
            if x_grad is not None and weight_grad is not None:
                logits_grad = _logits_grad(log_p, target, kept, scale).to(product)
                x_grad[part] = logits_grad @ head
                _add_product(weight_grad, logits_grad, rows)
    return CrossEntropy(loss, x_grad, weight_grad)


def _logits_grad(log_p: Tensor, target: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Turn the log probabilities [C, V] of a chunk into the gradient at its logits, in place.

    `target` and `kept` are [C, 1].
    """
    grad = log_p.exp_()
    grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
    return grad.mul_(kept.to(grad.dtype) * scale)  # a bool times a float would be float32


def _add_product(total: Tensor, logits_grad: Tensor, rows: Tensor) -> None:
    """Add logits_grad^T rows, of [C, V] and [C, D], to `total` [V, D]."""
    if rows.dtype is total.dtype:
        total.addmm_(logits_grad.t(), rows)
    else:
        total += logits_grad.t() @ rows

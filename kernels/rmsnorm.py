"""Root-mean-square normalisation (arXiv:1910.07467).

With r = 1 / sqrt(mean(x^2) + eps), n = x r and g = dy * weight,

    y = n * weight,    dx = r (g - n mean(g * n)),    dweight = sum over rows of dy * n
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tangram.kernels.products import accumulator


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x` [..., D] over its root mean square, times `weight` [D], in the dtype of `x`.

    The statistics and the product with the weight are at least float32; only the result is rounded. Backward
    keeps the arguments and one number a row.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(accumulator(x.dtype))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, wide_grad = x * scale, grad.to(scale.dtype)
        per_element = wide_grad * normed  # serves both gradients
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            mean = (per_element @ weight.to(scale.dtype)).unsqueeze(-1) / x.shape[-1]
            x_grad = (wide_grad * weight).sub_(normed.mul_(mean)).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            weight_grad = per_element.flatten(0, -2).sum(0).to(weight.dtype)
        return x_grad, weight_grad, None

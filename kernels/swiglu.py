"""The gated activation of a feed-forward (arXiv:2002.05202).

With [gate | up] the input and s = 1 / (1 + exp(-gate)),

    y = silu(gate) * up,    silu(gate) = gate s
    dgate = dy * up * (s + silu(gate) (1 - s)),    dup = dy * silu(gate)
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tangram.kernels.products import accumulator


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu of the first half of `gate_up` [..., 2 I] times the second half, [..., I], in its dtype.

    It is computed at least in float32; only the result is rounded. Backward keeps the input alone.

    Raises:
        ValueError: The last dimension is odd.
    """
    width = gate_up.shape[-1]
    if width % 2:
        raise ValueError(f"swiglu needs two halves of one width, but the last dimension is {width}")
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.to(accumulator(gate_up.dtype)).chunk(2, -1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        wide = accumulator(gate_up.dtype)
        gate, up = gate_up.to(wide).chunk(2, -1)
        grad = grad.to(wide)
        halves = torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
        return torch.cat(halves, -1).to(gate_up.dtype)

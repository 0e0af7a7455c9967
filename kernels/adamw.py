"""AdamW (arXiv:1711.05101, algorithm 2), its moments kept in float32 or in bfloat16 (arXiv:2412.19437, section 3.3.3).

With g the gradient at weight w, in step t of learning rate a,

    m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
    w = w (1 - a decay) - a / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

All of it is computed in the weights' dtype, float32; m and v are rounded when they are put away. To nearest, a
bfloat16 v stays where it is as soon as a step would move it by less than 2^-9 of itself: with beta2 = 0.999 it ends a
quarter too large. Stochastic rounding goes up or down, to each as often as it is near, so that the mean of what is
kept is what was computed: 16 random bits are added below the last place of bfloat16, and the sum is cut off there.

The random bits of element i are a hash of i and of a seed (after github.com/skeeto/hash-prospector), the same in plain
torch and in the kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tangram.kernels.backend import takes_kernel
from tangram.kernels.jit import tl, triton

_BLOCK = 1024
"""Weights that one program of the kernel steps."""

_SEEDS = 1 << 31


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    stochastic: torch.Generator | None = None,
) -> None:
    """Step weights along their gradients in place, and their moments with them.

    The kernel steps float32 weights; in float64 they are stepped in plain torch everywhere.

    Args:
        parameters: Weights in float32 or float64, all on one device, of any shapes and strides.
        gradients: As many, in their shapes and dtype.
        first: First moments m in the dtype of the weights, or all in bfloat16.
        second: Second moments v in the dtype of the first.
        lr: Learning rate a.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, times the learning rate.
        step: Number t of this step, from 1.
        stochastic: Rounds bfloat16 moments at random with a seed for each weight from this generator of the CPU;
            otherwise they are rounded to nearest.

    Raises:
        ValueError: Lists or shapes differ, or weights or moments are in a dtype in which they cannot be kept.
    """
    if not parameters:
        return
    for shapes in zip(*([t.shape for t in each] for each in (parameters, gradients, first, second)), strict=True):
        if len(set(shapes)) > 1:
            raise ValueError(f"a weight, its gradient and its moments have one shape, not {list(map(list, shapes))}")
    wide, kept = parameters[0].dtype, {moment.dtype for moment in (*first, *second)}
    if wide not in (torch.float32, torch.float64):
        raise ValueError(f"weights in {wide} lose what a step adds to them; step float32 masters")
    if len(kept) > 1 or not kept <= {wide, torch.bfloat16}:
        raise ValueError(f"moments of {wide} weights are all {wide} or all bfloat16, not {sorted(map(str, kept))}")
    if stochastic is not None and kept != {torch.bfloat16}:
        raise ValueError(f"moments in {kept.pop()} are not rounded; stochastic rounding is for bfloat16")
    with torch.no_grad():
        # The kernel and torch's fused step go through memory as it lies.
        grads = [gradient.contiguous() for gradient in gradients]
        written = [*parameters, *first, *second]
        dense = [tensor.contiguous() for tensor in written]
        count = len(parameters)
        weights, m, v = dense[:count], dense[count : 2 * count], dense[2 * count :]
        seeds = [_seed(stochastic) for _ in parameters]
        settings = (lr, *betas, eps, weight_decay, step)
        if wide is torch.float32 and takes_kernel(parameters[0]):
            for args in zip(weights, grads, m, v, seeds, strict=True):
                torch.ops.tangram.adamw(*args, *settings)
        else:
            _step(weights, grads, m, v, seeds, *settings)
        for tensor, copy in zip(written, dense, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def _seed(generator: torch.Generator | None) -> int | None:
    return None if generator is None else int(torch.randint(_SEEDS, (), generator=generator))


def _step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    seeds: list[int | None],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
) -> None:
    if first[0].dtype is parameters[0].dtype:  # one pass over memory, in torch
        before = [torch.full((), step - 1.0, dtype=torch.float32, device=parameter.device) for parameter in parameters]
        adamw(
            parameters,
            gradients,
            first,
            second,
            [],
            before,
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=decay,
        )
        return
    for weight, grad, m, v, seed in zip(parameters, gradients, first, second, seeds, strict=True):
        wide_m = m.to(weight.dtype).lerp_(grad, 1 - beta1)
        wide_v = v.to(weight.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if seed is None:
            m.copy_(wide_m)
            v.copy_(wide_v)
        else:
            bits = _random_bits(weight, seed)
            m.copy_(_rounded(wide_m, bits & 0xFFFF))
            v.copy_(_rounded(wide_v, (bits >> 16) & 0xFFFF))
        root = wide_v.div_(1 - beta2**step).sqrt_().add_(eps)
        weight.mul_(1 - lr * decay).addcdiv_(wide_m, root, value=-lr / (1 - beta1**step))


def _random_bits(x: Tensor, seed: int) -> Tensor:
    """Return 32 random bits, int32, for every element of `x`."""
    bits = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape).mul_(0x61C88647) ^ seed
    bits.bitwise_xor_((bits >> 16) & 0xFFFF).mul_(0x21F0AAAD)
    bits.bitwise_xor_((bits >> 15) & 0x1FFFF).mul_(0x735A2D97)
    return bits.bitwise_xor_((bits >> 15) & 0x1FFFF)


def _rounded(x: Tensor, noise: Tensor) -> Tensor:
    """Return float32 numbers that are bfloat16 ones: `x`, rounded up or down as 16 bits of noise say."""
    x = x.float()
    cut = ((x.view(torch.int32) + noise) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isnan(), x, cut)  # the sum may carry a NaN over into a number


@triton.jit
def _adamw(
    parameter,
    gradient,
    first,
    second,
    count,
    seed,
    rate,
    shrink,
    correction,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    stochastic: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    weight = tl.load(parameter + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    m += (grad - m) * (1 - beta1)
    v = v * beta2 + grad * grad * (1 - beta2)
    root = tl.sqrt_rn(v / correction) + eps
    tl.store(parameter + at, weight * shrink - rate * m / root, mask=inside)
    if stochastic:
        bits = (at.to(tl.uint32) * 0x61C88647) ^ seed
        bits = (bits ^ (bits >> 16)) * 0x21F0AAAD
        bits = (bits ^ (bits >> 15)) * 0x735A2D97
        bits = bits ^ (bits >> 15)
        m = _cut(m, bits & 0xFFFF)
        v = _cut(v, bits >> 16)
    tl.store(first + at, m.to(first.dtype.element_ty), mask=inside)
    tl.store(second + at, v.to(second.dtype.element_ty), mask=inside)


@triton.jit
def _cut(x, noise):
    cut = ((x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, cut, x)


@torch.library.custom_op("tangram::adamw", mutates_args=("parameter", "first", "second"))
def _adamw_op(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    seed: int | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
) -> None:
    """Step one contiguous weight."""
    if not takes_kernel(parameter):
        _step([parameter], [gradient], [first], [second], [seed], lr, beta1, beta2, eps, decay, step)
    elif parameter.numel():
        _adamw[(triton.cdiv(parameter.numel(), _BLOCK),)](
            parameter,
            gradient,
            first,
            second,
            parameter.numel(),
            seed or 0,
            lr / (1 - beta1**step),
            1 - lr * decay,
            1 - beta2**step,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            stochastic=seed is not None,
            BLOCK=_BLOCK,
        )


@_adamw_op.register_fake
def _(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    seed: int | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
) -> None:
    return None

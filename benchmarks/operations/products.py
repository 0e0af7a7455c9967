"""Cases of fp8_matmul: a linear's forward, its input gradient and its weight gradient, of operands already in FP8."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from operations.case import Case, Function, Peer, room, within
from operations.scale import Scale
from tangram.kernels import Quantized, fp8_matmul, quantize_blocks, quantize_tiles
from tangram.kernels.native import native_passes
from tangram.kernels.quantize import PLAIN, Passes


def cases(scale: Scale) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield them."""
    for outputs, inputs in scale.linears:
        for name, make in (("forward", _forward), ("input gradient", _input_grad), ("weight gradient", _weight_grad)):
            yield f"fp8_matmul, {name}", partial(make, scale, outputs, inputs)


def passes(scale: Scale) -> Passes:
    """Return how codes are decoded: as training does it."""
    return native_passes() if scale.device == "cpu" else PLAIN


def spread(scales: Tensor, like: Tensor) -> Tensor:
    """Return the scale of every code: of tiles, or of blocks where there are fewer rows of them."""
    if scales.shape[-2] != like.shape[-2]:
        scales = scales.repeat_interleave(128, -2)[..., : like.shape[-2], :]
    return scales.repeat_interleave(128, -1)[..., : like.shape[-1]]


def decoded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers, multiplied in float32 or in the dtype of the scales."""
    return (codes.to(scales.dtype) * spread(scales, codes)).to(dtype)


def tensor_wise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of x with one scale for all of it."""
    scale = x.float().abs().amax() / 448
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def _forward(scale: Scale, outputs: int, inputs: int) -> Case:
    x, w = scale.draw(scale.rows, inputs), scale.draw(outputs, inputs)
    return _case(scale, "forward", (x, w), quantize_tiles(x), quantize_blocks(w), scale.dtype)


def _input_grad(scale: Scale, outputs: int, inputs: int) -> Case:
    grad, w = scale.draw(scale.rows, outputs), scale.draw(outputs, inputs)
    across = Quantized(*(each.t().contiguous() for each in quantize_blocks(w)))
    return _case(scale, "input gradient", (grad, w.t()), quantize_tiles(grad), across, scale.dtype)


def _weight_grad(scale: Scale, outputs: int, inputs: int) -> Case:
    grad, x = scale.draw(scale.rows, outputs), scale.draw(scale.rows, inputs)
    a, b = (quantize_tiles(each, transposed=True) for each in (grad, x))
    return _case(scale, "weight gradient", (grad.t(), x.t()), a, b, torch.float32)  # masters are in float32


def _case(
    scale: Scale, name: str, plain: tuple[Tensor, Tensor], a: Quantized, b: Quantized, dtype: torch.dtype
) -> Case:
    (rows, depth), columns = a.codes.shape, len(b.codes)

    def ours(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
        return fp8_matmul(Quantized(a, a_scales), Quantized(b, b_scales), dtype, passes(scale))

    def formula(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
        wide = torch.float64 if a_scales.dtype is torch.float64 else scale.dtype
        return decoded(a, a_scales, wide) @ decoded(b, b_scales, wide).t()

    return Case(
        operation=f"fp8_matmul, {name}",
        shape=f"{rows} x {columns} x {depth}",
        inputs=(*a, *b),
        ours=ours,
        formula=formula,
        check=within(room(dtype, depth, scale.device)),
        flops=2.0 * rows * columns * depth,
        peers={
            product_name(scale): Peer(lambda: lambda *_: plain[0] @ plain[1].t()),
            "F.scaled_mm, tensor": Peer(partial(_scaled_tensor, *plain, dtype)),
            "F.scaled_mm, blocks": Peer(partial(_scaled_blocks, a, b, dtype)),
            "torchao": Peer(partial(_torchao, a, b, dtype)),
        },
    )


def product_name(scale: Scale) -> str:
    """Return what the product in the dtype of activations is called."""
    return f"{str(scale.dtype).removeprefix('torch.')} product"


def _scaled_tensor(x: Tensor, w: Tensor, dtype: torch.dtype) -> Function:
    whole = F.ScalingType.TensorWise
    (a, a_scale), (b, b_scale) = tensor_wise(x.contiguous()), tensor_wise(w.contiguous())
    return lambda *_: F.scaled_mm(a, b.t(), a_scale, whole, b_scale, whole, output_dtype=dtype)


def _scaled_blocks(a: Quantized, b: Quantized, dtype: torch.dtype) -> Function:
    kinds, none = F.ScalingType, F.SwizzleType.NO_SWIZZLE
    scales = a.scales.t().contiguous().t()
    if len(b.scales) == len(b.codes):
        kind, others = kinds.BlockWise1x128, b.scales.t().contiguous().t()
    else:  # whole 16 bytes of scales for each block row
        kind, others = kinds.BlockWise128x128, F.pad(b.scales, (0, -b.scales.shape[1] % 4), value=1.0).t()
    return lambda *_: F.scaled_mm(
        a.codes,
        b.codes.t(),
        scales,
        kinds.BlockWise1x128,
        others,
        kind,
        swizzle_a=none,
        swizzle_b=none,
        output_dtype=dtype,
    )


def _torchao(a: Quantized, b: Quantized, dtype: torch.dtype) -> Function:
    from torchao.prototype.blockwise_fp8_training import kernels

    scales = a.scales.t().contiguous().t()
    if len(b.scales) == len(b.codes):
        others = b.scales.t().contiguous()
        return lambda *_: kernels.triton_fp8_gemm_1x128_128x1(a.codes, b.codes.t(), scales, others, out_dtype=dtype)
    return lambda *_: kernels.triton_fp8_gemm_1x128_128x128(a.codes, b.codes.t(), scales, b.scales.t(), out_dtype=dtype)

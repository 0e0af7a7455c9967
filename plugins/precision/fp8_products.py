"""The three products of a linear in FP8, and what is kept of its input in between."""

from collections.abc import Mapping

import torch
from attrs import frozen
from torch import Tensor

from tangram.kernels import (
    Quantized,
    Scaling,
    dequantize,
    fp8_grouped_matmul,
    fp8_matmul,
    fp8_weight_grad,
    grouped_matmul_forward,
    limited_product,
    pack_e5m6,
    quantize_blocks,
    quantize_tiles,
    unpack_e5m6,
)
from tangram.kernels.fp8_weight_grad import round_tiles, tile_ends
from tangram.kernels.native import passes_for

_TILE = 128


@frozen
class Products:
    """How a linear multiplies.

    Attributes:
        input: How its input is quantised.
        weight: How its weight is: with a scale for blocks of 128 x 128, or for the tensor.
        gradient: How the gradient at its output is.
        limited: Sums as short as a tensor core's, not promoted.
        wide_cache: Its input is kept in E5M6 instead of the codes that were multiplied.
    """

    input: Scaling
    weight: Scaling
    gradient: Scaling
    limited: bool
    wide_cache: bool

    def quantize(self, x: Tensor) -> Quantized:
        """Return the input [M, K] in tiles of 1 x 128."""
        return _tiles(x, self.input)

    def kept(self, x: Tensor, rounded: Quantized) -> tuple[Tensor, Tensor]:
        """Return what to keep of the input [M, K] for backward: a byte a number, or a byte and a half."""
        return pack_e5m6(x, _TILE, passes_for(x)) if self.wide_cache else rounded

    def restored(self, kept: tuple[Tensor, Tensor], width: int, dtype: torch.dtype) -> Tensor:
        """Return the input [M, K] as what was kept gives it back."""
        if self.wide_cache:
            return unpack_e5m6(*kept, width, dtype)
        return dequantize(*kept, (1, _TILE), dtype=dtype, passes=passes_for(kept[0]))

    def forward(self, x: Quantized, weight: Tensor, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return x [M, K] times the weight [N, K] transposed, or each expert's rows times its own of [E, N, K]."""
        return self._product(x, self._weight(weight), counts, dtype)

    def input_grad(self, grad: Tensor, weight: Tensor, counts: Tensor | None) -> Tensor:
        """Return the gradient at the input [M, K] for the one at the output [M, N]."""
        codes, scales = self._weight(weight)
        across = Quantized(codes.mT.contiguous(), scales.mT.contiguous())
        return self._product(_tiles(grad, self.gradient), across, counts, grad.dtype)

    def weight_grad(self, grad: Tensor, x: Tensor, counts: Tensor | None) -> Tensor:
        """Return the gradient at the weight for the one at the output [M, N] and the input [M, K]."""
        if self.limited:
            ends = tile_ends(len(grad), counts)
            one, other = round_tiles(grad, ends, self.gradient), round_tiles(x, ends, self.input)
            sizes = [len(grad)] if counts is None else counts.tolist()
            parts = [limited_product(g.t(), r.t()) for g, r in zip(one.split(sizes), other.split(sizes), strict=True)]
            return parts[0] if counts is None else torch.stack(parts)
        # A GPU's product ends in float32; a CPU multiplies in the dtype of its operands.
        dtype = torch.float32 if grad.is_cuda else grad.dtype
        return fp8_weight_grad(
            grad, x, counts, dtype, grad_scaling=self.gradient, x_scaling=self.input, passes=passes_for(grad)
        )

    def measures(self, x: Tensor, weight: Tensor, counts: Tensor | None) -> Mapping[str, float]:
        """Return the largest input, the share of inputs that become zero, and the relative error of the product."""
        with torch.no_grad():
            rounded = self.quantize(x)
            product = self.forward(rounded, weight, counts, torch.float32)
            if counts is None:
                exact = x.float() @ weight.float().t()
            else:
                exact = grouped_matmul_forward(x.float(), weight.float(), counts)
            lost = (rounded.codes.float() == 0) & (x != 0)
            return {
                "fp8_peak": float(x.abs().amax()) if x.numel() else 0.0,
                "fp8_underflow": float(lost.float().mean()) if x.numel() else 0.0,
                "fp8_error": float((product - exact).norm() / exact.norm().clamp_min(1e-30)),
            }

    def _product(self, a: Quantized, b: Quantized, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self.limited:
            return _limited(a, b, counts).to(dtype)
        if counts is None:
            return fp8_matmul(a, b, dtype, passes_for(a.codes))
        return fp8_grouped_matmul(a, b, counts, dtype, passes_for(a.codes))

    def _weight(self, weight: Tensor) -> Quantized:
        whole = self.weight.shared == "tensor"
        return quantize_blocks(weight, _TILE, format=self.weight.format, whole=whole, passes=passes_for(weight))


def _tiles(x: Tensor, scaling: Scaling) -> Quantized:
    return quantize_tiles(
        x, _TILE, scaling.power_of_two, format=scaling.format, shared=scaling.shared, passes=passes_for(x)
    )


def _limited(a: Quantized, b: Quantized, counts: Tensor | None) -> Tensor:
    """Return a [M, K] times b [N, K] transposed, or each expert's rows times its own, in short sums; float32."""
    left, right = dequantize(*a, (1, _TILE)), dequantize(*b, (_TILE, _TILE))
    if counts is None:
        return limited_product(left, right)
    if left.is_meta:  # without memory the counts say nothing: all rows are one expert's
        return limited_product(left, right[0])
    parts = zip(left.split(counts.tolist()), right, strict=True)
    return torch.cat([limited_product(rows, matrix) for rows, matrix in parts])

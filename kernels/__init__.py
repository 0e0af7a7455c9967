"""The operations, each a plain function of tensors: one file per op, its mathematics first."""

from tangram.kernels.backend import paths, use
from tangram.kernels.causal_attention import causal_attention, masked_attention
from tangram.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from tangram.kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_weight_grad, pad_groups
from tangram.kernels.fp8_matmul import fp8_matmul
from tangram.kernels.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_forward,
    grouped_matmul_input_grad,
    grouped_matmul_loop,
    grouped_matmul_weight_grad,
)
from tangram.kernels.permute import Order, order_by_expert, permute, unpermute
from tangram.kernels.products import accumulator, native_bfloat16, product, product_dtype
from tangram.kernels.quantize import Quantized, dequantize, quantize_blocks, quantize_tiles
from tangram.kernels.rmsnorm import rmsnorm
from tangram.kernels.rope import Yarn, frequencies, rope, rotate, rotation
from tangram.kernels.swiglu import swiglu

__all__ = [
    "CrossEntropy",
    "Order",
    "Quantized",
    "Yarn",
    "accumulator",
    "causal_attention",
    "dequantize",
    "fp8_grouped_matmul",
    "fp8_grouped_weight_grad",
    "fp8_matmul",
    "frequencies",
    "grouped_matmul",
    "grouped_matmul_forward",
    "grouped_matmul_input_grad",
    "grouped_matmul_loop",
    "grouped_matmul_weight_grad",
    "linear_cross_entropy",
    "masked_attention",
    "native_bfloat16",
    "order_by_expert",
    "pad_groups",
    "paths",
    "permute",
    "product",
    "product_dtype",
    "quantize_blocks",
    "quantize_tiles",
    "rmsnorm",
    "rope",
    "rotate",
    "rotation",
    "swiglu",
    "unpermute",
    "use",
]

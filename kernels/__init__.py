"""The operations, each a plain function of tensors: one file per op, its mathematics first."""

from tangram.kernels.adamw import adamw_step
from tangram.kernels.backend import paths, use
from tangram.kernels.causal_attention import causal_attention, masked_attention
from tangram.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from tangram.kernels.dispatch import SeesOperations, place_of, tensors_in
from tangram.kernels.e5m6 import pack as pack_e5m6
from tangram.kernels.e5m6 import unpack as unpack_e5m6
from tangram.kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_weight_grad, pad_groups
from tangram.kernels.fp8_matmul import fp8_matmul
from tangram.kernels.fp8_weight_grad import fp8_weight_grad
from tangram.kernels.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_forward,
    grouped_matmul_input_grad,
    grouped_matmul_loop,
    grouped_matmul_weight_grad,
)
from tangram.kernels.limited_product import limited_product
from tangram.kernels.mla_decode import absorb, append_entries, expand, mla_decode
from tangram.kernels.permute import Order, order_by_expert, permute, unpermute
from tangram.kernels.products import accumulator, native_bfloat16, product, product_dtype, product_transposed
from tangram.kernels.quantize import Quantized, Scaling, dequantize, quantize_blocks, quantize_tiles
from tangram.kernels.replay import Recording, record, records
from tangram.kernels.rmsnorm import rmsnorm
from tangram.kernels.rope import Yarn, frequencies, rope, rotate, rotation
from tangram.kernels.routed import choose, weigh
from tangram.kernels.swiglu import swiglu, swiglu_quantized

__all__ = [
    "CrossEntropy",
    "Order",
    "Quantized",
    "Recording",
    "Scaling",
    "SeesOperations",
    "Yarn",
    "absorb",
    "accumulator",
    "adamw_step",
    "append_entries",
    "causal_attention",
    "choose",
    "dequantize",
    "expand",
    "fp8_grouped_matmul",
    "fp8_grouped_weight_grad",
    "fp8_matmul",
    "fp8_weight_grad",
    "frequencies",
    "grouped_matmul",
    "grouped_matmul_forward",
    "grouped_matmul_input_grad",
    "grouped_matmul_loop",
    "grouped_matmul_weight_grad",
    "limited_product",
    "linear_cross_entropy",
    "masked_attention",
    "mla_decode",
    "native_bfloat16",
    "order_by_expert",
    "pack_e5m6",
    "pad_groups",
    "paths",
    "permute",
    "place_of",
    "product",
    "product_dtype",
    "product_transposed",
    "quantize_blocks",
    "quantize_tiles",
    "record",
    "records",
    "rmsnorm",
    "rope",
    "rotate",
    "rotation",
    "swiglu",
    "swiglu_quantized",
    "tensors_in",
    "unpack_e5m6",
    "unpermute",
    "use",
    "weigh",
]

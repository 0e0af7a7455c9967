"""Right arithmetic for Triton's interpreter, whose FP8 and bfloat16 are wrong up to Triton 3.9.

Its casts lose a carry (1.94 becomes the E4M3 number 1.0), truncate where they should round (bfloat16, and E4M3
below its normal numbers) and do not saturate; it multiplies and adds bfloat16 as if its bits were integers. Here
the casts are torch's, clamped as the GPU's saturating conversion is, and bfloat16 is computed in float32 and
rounded (triton-lang/triton, issue 8322 and pull request 11897).

Reductions of bfloat16 and arithmetic on FP8 values stay wrong: kernels widen both to float32 first.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import numpy as np
import torch

_NAMES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
"""Triton's names of the types whose casts are replaced."""

_INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}

_PRIVATE = (
    "_convert_float",
    "TensorHandle",
    "InterpreterBuilder.create_dot",
    "InterpreterBuilder.binary_op",
    "InterpreterBuilder.unary_op",
    "_ir.ROUNDING_MODE.RTZ",
)
"""What is replaced or used of the interpreter, of which no Triton promises anything."""

_MARK = "tangram_repaired"


def repair() -> None:
    """Replace the interpreter's casts and its bfloat16 arithmetic; once is enough.

    Raises:
        RuntimeError: This Triton's interpreter has no longer the parts that are replaced.
    """
    import triton
    from triton.runtime import interpreter

    missing = [name for name in _PRIVATE if not _has(interpreter, name)]
    if missing:
        raise RuntimeError(
            f"the interpreter of Triton {triton.__version__} has no {', '.join(missing)}: its FP8 and bfloat16 cannot "
            "be repaired; use Triton 3.6 to 3.9, or unset TRITON_INTERPRET"
        )
    if hasattr(interpreter.InterpreterBuilder, _MARK):
        return
    setattr(interpreter.InterpreterBuilder, _MARK, True)
    interpreter._convert_float = _cast(interpreter._convert_float, interpreter._ir.ROUNDING_MODE.RTZ)
    _repair_arithmetic(interpreter)


def _has(module: object, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def _cast(original: Callable[..., Any], toward_zero: object) -> Callable[..., Any]:
    """Return the cast of bits from one floating type to another, to nearest even and saturating in FP8."""

    def convert(bits: Any, source: Any, target: Any, rounding_mode: object) -> Any:
        source, target = source.scalar, target.scalar
        known = source.name in _NAMES and target.name in _NAMES
        if not known or rounding_mode == toward_zero:
            return original(bits, source, target, rounding_mode)
        values = _tensor(bits, source)
        wanted = _NAMES[target.name]
        if target.primitive_bitwidth == 8:
            largest = torch.finfo(wanted).max
            wide = values.float()
            values = torch.where(wide.isnan(), wide, wide.clamp(-largest, largest))
        return _bits(values.to(wanted)).reshape(np.shape(bits))

    return convert


def _tensor(bits: Any, type_: Any) -> torch.Tensor:
    """Return the numbers of a Triton type that are kept as `bits`, in a tensor of its own."""
    integers = np.ascontiguousarray(bits).view(f"int{type_.primitive_bitwidth}").copy()
    return torch.from_numpy(integers).view(_NAMES[type_.name])


def _bits(values: torch.Tensor) -> Any:
    """Return the bits of numbers as unsigned integers of their width."""
    width = values.element_size() * 8
    return values.contiguous().view(_INTEGERS[width]).numpy().view(f"uint{width}")


def _repair_arithmetic(interpreter: Any) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, binary, unary = builder.create_dot, builder.binary_op, builder.unary_op

    def widened(operand: Any) -> Any:
        return interpreter._convert_float(operand.data, operand.dtype.scalar, tl.float32, None).view(np.float32)

    def rounded(values: Any) -> Any:
        bits = interpreter._convert_float(np.asarray(values, np.float32), tl.float32, tl.bfloat16, None)
        return handle(bits.view(np.uint16), tl.bfloat16)

    def is_bfloat16(operand: Any) -> bool:
        return bool(operand.dtype.scalar == tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        narrow = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
        if a.dtype.scalar not in narrow and b.dtype.scalar not in narrow:
            return dot(self, a, b, d, *rest)
        return handle(np.matmul(widened(a), widened(b)) + d.data, d.dtype.scalar)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (is_bfloat16(lhs) and is_bfloat16(rhs)):
            return binary(self, lhs, rhs, op)
        values = op(widened(lhs), widened(rhs))
        return handle(values, tl.int1) if values.dtype == bool else rounded(values)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        return rounded(op(widened(arg))) if is_bfloat16(arg) else unary(self, arg, op)

    builder.create_dot, builder.binary_op, builder.unary_op = create_dot, binary_op, unary_op

"""Triton, where something can run it: a GPU, or the interpreter that TRITON_INTERPRET=1 turns on.

Elsewhere it is not imported at all: a CPU needs neither the package nor the time. Then `triton` and `tl` are
placeholders, with which the kernels' definitions can be read past.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on a CPU. Triton reads the variable when it is first imported."""

INSTALLED = find_spec("triton") is not None
"""Whether there is a Triton to import."""

RUNS = INSTALLED and (INTERPRETED or torch.cuda.is_available())
"""Whether a kernel can run in this process."""


class _Placeholder:
    """Stands for a module that was not imported; as a decorator it gives back what it is put on."""

    def __getattr__(self, name: str) -> "_Placeholder":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self


if TYPE_CHECKING or RUNS:
    import triton
    import triton.language as tl

    if INTERPRETED:
        from tangram.kernels import interpreter

        interpreter.repair()
else:
    triton = tl = _Placeholder()


def wide_type(dtype: torch.dtype) -> Any:
    """Return Triton's name of the dtype in which a kernel computes: float64 for float64, and else float32."""
    return tl.float64 if dtype is torch.float64 else tl.float32


__all__ = ["INSTALLED", "INTERPRETED", "RUNS", "tl", "triton", "wide_type"]

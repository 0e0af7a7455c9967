"""Triton, where something can run it: a GPU, or the interpreter that TRITON_INTERPRET=1 turns on.

Elsewhere it is not imported at all: a CPU needs neither the package nor the time. Then `triton` and `tl` are
placeholders, with which the kernels' definitions can be read past.
"""

import os
from typing import TYPE_CHECKING, Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on a CPU. Triton reads the variable when it is first imported."""

RUNS = INTERPRETED or torch.cuda.is_available()
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

__all__ = ["INTERPRETED", "RUNS", "tl", "triton"]

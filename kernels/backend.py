"""Which path an operation takes: its twin in plain torch, or its Triton kernel.

`TANGRAM_KERNELS`, or `use` around a piece of code, says:

    auto         the kernel for tensors on a GPU, the twin for all others
    reference    the twin
    triton       the kernel; on a CPU it runs in Triton's interpreter, if TRITON_INTERPRET=1 is set

Nothing falls back: a kernel that is asked for and cannot run is an error that says what to do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch import Tensor

from tangram.kernels.jit import INTERPRETED, RUNS

Choice = Literal["auto", "reference", "triton"]

# For the whole process and not for a thread: on a GPU autograd runs backward in a thread of its own.
_used: list[Choice] = []


def chosen() -> Choice:
    """Return the choice in force: the innermost `use`, or else what `TANGRAM_KERNELS` says.

    Raises:
        ValueError: `TANGRAM_KERNELS` is none of the choices.
    """
    if _used:
        return _used[-1]
    return _choice(os.environ.get("TANGRAM_KERNELS") or "auto", "TANGRAM_KERNELS")


@contextmanager
def use(choice: Choice) -> Iterator[None]:
    """Choose the path of every operation inside, in all threads.

    Raises:
        ValueError: It is none of the choices.
    """
    _used.append(_choice(choice, "kernels.use"))
    try:
        yield
    finally:
        _used.pop()


def takes_kernel(x: Tensor) -> bool:
    """Return whether an operation on `x` runs its Triton kernel.

    Raises:
        RuntimeError: It should, and cannot here.
    """
    choice = chosen()
    if choice == "reference" or (choice == "auto" and not x.is_cuda):
        return False
    if not RUNS:
        raise RuntimeError(
            "Triton runs on a GPU, or on a CPU in its interpreter: set TRITON_INTERPRET=1 before Python starts, or "
            "TANGRAM_KERNELS=reference for the operations in plain torch"
        )
    if not x.is_cuda and not INTERPRETED:
        raise RuntimeError(
            f"a Triton kernel cannot read a tensor on {x.device.type}: move it to the GPU, or set "
            "TRITON_INTERPRET=1 before Python starts, or TANGRAM_KERNELS=reference"
        )
    return True


def paths() -> dict[str, str]:
    """Return the path that an operation takes for tensors on a CPU and on a GPU, and why."""
    choice = chosen()
    why = "kernels.use" if _used else "TANGRAM_KERNELS" if os.environ.get("TANGRAM_KERNELS") else "the default"
    said = f"{choice} by {why}"
    cpu = "the Triton kernel in the interpreter" if choice == "triton" and INTERPRETED else "the twin in plain torch"
    if choice == "triton" and not INTERPRETED:
        cpu = "an error: it needs TRITON_INTERPRET=1"
    gpu = "the twin in plain torch" if choice == "reference" else "the Triton kernel"
    return {"cpu": f"{cpu} ({said})", "gpu": f"{gpu} ({said})"}


def _choice(text: str, source: str) -> Choice:
    for choice in get_args(Choice):
        if text == choice:
            return choice
    raise ValueError(f"{source} is {text!r}; it is auto, reference or triton")

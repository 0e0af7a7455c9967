"""Which path an operation takes: its twin in plain torch, or its Triton kernel.

`TANGRAM_KERNELS`, read when it is first needed, or `use` around a piece of code, says:

    auto         the kernel for tensors on a GPU, the twin for all others
    reference    the twin
    triton       the kernel; on a CPU it runs in Triton's interpreter, if TRITON_INTERPRET=1 is set

Nothing falls back: a kernel that is asked for and cannot run is an error that says what to do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

from torch import Tensor

from tangram.kernels.jit import INSTALLED, INTERPRETED

Choice = Literal["auto", "reference", "triton"]

# For the whole process and not for a thread: on a GPU autograd runs backward in a thread of its own.
_used: list[Choice] = []


class BackendError(ValueError):
    """What was chosen is no path, or one that cannot be taken here; the message says what to do."""


def chosen() -> Choice:
    """Return the choice in force: the innermost `use`, or else what `TANGRAM_KERNELS` says.

    Raises:
        BackendError: `TANGRAM_KERNELS` is none of the choices.
    """
    if _used:
        return _used[-1]
    return _by_environment()


@cache
def _by_environment() -> Choice:
    return _choice(os.environ.get("TANGRAM_KERNELS") or "auto", "TANGRAM_KERNELS")


@contextmanager
def use(choice: Choice) -> Iterator[None]:
    """Choose the path of every operation inside, in all threads.

    Raises:
        BackendError: It is none of the choices.
    """
    _used.append(_choice(choice, "kernels.use"))
    try:
        yield
    finally:
        _used.pop()


def takes_kernel(x: Tensor) -> bool:
    """Return whether an operation on `x` runs its Triton kernel.

    Raises:
        BackendError: It should, and cannot here.
    """
    if not _asked_for(x.device.type):
        return False
    hindrance = _hindrance(x.device.type)
    if hindrance is not None:
        raise BackendError(hindrance)
    return True


def paths() -> dict[str, str]:
    """Return the path that an operation takes for tensors on a CPU ("cpu") and on a GPU ("cuda"), and why.

    Raises:
        BackendError: `TANGRAM_KERNELS` is none of the choices.
    """
    said = "kernels.use" if _used else "TANGRAM_KERNELS" if os.environ.get("TANGRAM_KERNELS") else "the default"
    return {device: f"{_path(device)} ({chosen()} by {said})" for device in ("cpu", "cuda")}


def _path(device: str) -> str:
    if not _asked_for(device):
        return "plain torch"
    hindrance = _hindrance(device)
    if hindrance is not None:
        return f"an error: {hindrance}"
    return "the Triton kernel in the interpreter" if INTERPRETED else "the Triton kernel"


def _asked_for(device: str) -> bool:
    """Return whether the kernel is what tensors on a device of this type are to take."""
    choice = chosen()
    return choice == "triton" or (choice == "auto" and device == "cuda")


def _hindrance(device: str) -> str | None:
    """Return why the kernel cannot take tensors on a device of this type and what to do; None if it can."""
    if device == "cuda" or INTERPRETED:
        todo = "" if INSTALLED else "install the package triton"
    else:
        also = "" if INSTALLED else "install the package triton and "
        todo = f"move them to a GPU, or {also}set TRITON_INTERPRET=1 before Python starts"
    if not todo:
        return None
    return f"no Triton kernel runs here for tensors on {device}: {todo}, or set TANGRAM_KERNELS=reference"


def _choice(text: str, source: str) -> Choice:
    for choice in get_args(Choice):
        if text == choice:
            return choice
    raise BackendError(f"{source} is {text!r}; it is auto, reference or triton")

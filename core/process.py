"""What a training process asks of its operating system, and what it says of itself. Loads no torch by itself."""

import ctypes
import os
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def settle() -> None:
    """Let waiting threads sleep, and keep freed memory.

    Threads that spin while they wait take the cores from whoever has work: on a busy machine a step took ten times as
    long. And glibc returns large blocks at once, only to fault them in again page by page: 5 to 8 percent of a step.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def own_device(place: int = 0) -> "torch.device":
    """Return where the process of a place on this machine computes: at its GPU, or at the CPU where there is none."""
    import torch

    return torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")


def versions() -> dict[str, str]:
    """Return what the numbers of a run depend on."""
    from importlib import metadata

    import torch

    return {
        "tangram": metadata.version("tangram-lm"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
    }


def peak_rss() -> int:
    """Return the largest resident memory of this process so far, bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""What is installed, what loads, and what this machine can do."""

import os
import shutil
from importlib import metadata
from pathlib import Path

from tangram.core.plugins import Plugins
from tangram.core.process import versions
from tangram.kernels import native_bfloat16, paths

_PACKAGES = (
    "torch",
    "triton",
    "pluggy",
    "attrs",
    "cattrs",
    "ruamel.yaml",
    "cyclopts",
    "safetensors",
    "tokenizers",
    "matplotlib",
    "wandb",
)


def examine(plugins: Plugins) -> dict[str, object]:
    """Return the findings under names that a person reads.

    Raises:
        BackendError: `TANGRAM_KERNELS` chooses no path.
    """
    taken = paths()
    return {
        "tangram": _version("tangram-lm"),
        "python": versions()["python"],
        **{name: _version(name) for name in _PACKAGES},
        "device": versions()["device"],
        "cores": os.cpu_count() or 1,
        "operations on a CPU": taken["cpu"],
        "operations on a GPU": taken["cuda"],
        "bfloat16 products": "native" if native_bfloat16() else "emulated; precision.compute=float32 is faster here",
        "free disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB",
        "writable": os.access(Path.cwd(), os.W_OK),
        "components": len(list(plugins.registry)),
        "broken plugins": [str(broken) for broken in plugins.broken],
        "remarks on plugins": [str(remark) for remark in plugins.remarks],
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"

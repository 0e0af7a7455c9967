"""The small core: registries, contracts and hooks; presets; the trunk; the executor; the run.

The public names are imported on first use, so that `import tangram.core` costs nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tangram.core.model import build_model
    from tangram.core.presets import load_preset
    from tangram.core.registry import component
    from tangram.core.run import load_run, train

__all__ = ["build_model", "component", "load_preset", "load_run", "train"]

_HOMES = {
    "build_model": "model",
    "component": "registry",
    "load_preset": "presets",
    "load_run": "run",
    "train": "run",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tangram.core' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"tangram.core.{_HOMES[name]}"), name)

"""What a command line asks for: the plugins at hand, a preset, and an error that says where in it something stands."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tangram.core.plugins import Plugins
    from tangram.core.presets import Resolved

_T = TypeVar("_T")


def discover(files: Sequence[Path]) -> "Plugins":
    """Return the plugins that are installed, and those of the files."""
    from tangram.core.plugins import Plugins

    return Plugins.discover(files)


def look_up(preset: str, overrides: Sequence[str], files: Sequence[Path]) -> "Resolved":
    """Return a preset, a name or a file, under the overrides."""
    from tangram.core.presets import resolve

    return resolve(preset, overrides, discover(files))


def building(resolved: "Resolved", build: Callable[[], _T]) -> _T:
    """Call `build`; say where in the preset stands what a component found wrong."""
    from tangram.core.config import ConfigError, Problem
    from tangram.core.context import BuildError

    try:
        return build()
    except BuildError as error:
        origin = resolved.blame(error.path, error.message)
        raise ConfigError([Problem(origin, error.path, error.message)]) from error

"""Finds files that were imported under two names: such a module has two copies of its state."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

BARE = ("core", "kernels", "plugins", "presets", "testing")
"""Folders of the repository that are imported below `tangram` only."""


def imported_twice(modules: Mapping[str, ModuleType], root: Path) -> list[str]:
    """Return a line for each source file of `root` behind several of `modules`, and for each bare name."""
    folders = [root.resolve() / name for name in (*BARE, "tests")]  # not a virtual environment that lies there too
    copies: defaultdict[Path, dict[int, str]] = defaultdict(dict)
    for name, module in list(modules.items()):
        file = getattr(module, "__file__", None)
        if file is None:
            continue
        path = Path(file).resolve()
        if any(path.is_relative_to(folder) for folder in folders):
            copies[path].setdefault(id(module), name)
    lines = [
        f"{path.relative_to(root.resolve())} is imported as {' and as '.join(sorted(names.values()))}"
        for path, names in sorted(copies.items())
        if len(names) > 1
    ]
    return lines + [f"`{name}` is imported: say `tangram.{name}`" for name in BARE if name in modules]

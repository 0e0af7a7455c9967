"""Which plugins exist: found, imported one by one under a guard, and listed as broken where that fails."""

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType

import pluggy
from attrs import frozen

from tangram.core import hookspecs
from tangram.core.config import ConfigError, Problem, show_path, suggest
from tangram.core.registry import DuplicateComponentError, Registry

IN_TREE = "tangram"
"""Origin of what this distribution ships."""


@frozen
class Broken:
    """A plugin that could not be taken.

    Attributes:
        name: Module, entry point or file.
        origin: Who ships it: `tangram`, a distribution with its version, or a path.
        error: What happened.
    """

    name: str
    origin: str
    error: str

    def __str__(self) -> str:
        return f"{self.name} ({self.origin}) failed to load: {self.error}"


class PluginError(Exception):
    """A plugin that the user names is broken."""


class Plugins:
    """What exists: the registry, the presets that ship, and what is broken.

    Attributes:
        registry: The components.
        manager: The process's pluggy manager. It knows plugin modules, and no observer of any run.
        presets: Preset files by name.
        broken: What could not be taken.
    """

    def __init__(self) -> None:
        self.registry = Registry()
        self.manager = _new_manager()
        self.presets: dict[str, Path] = {}
        self.broken: list[Broken] = []

    @classmethod
    def discover(cls, files: Sequence[str | Path] = ()) -> "Plugins":
        """Find what ships in tree, what installed packages declare, and what is in `files`.

        Raises:
            ConfigError: One of `files` is not there.
            PluginError: One of `files` does not load.
        """
        plugins = cls()
        folder = Path(str(resources.files("tangram.presets")))
        plugins.presets = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        plugins.take_package("tangram.plugins", IN_TREE)
        for point in metadata.entry_points(group="tangram"):
            plugins.take_entry_point(point)
        for file in files:
            plugins.take_file(Path(file))
        return plugins

    def take_package(self, name: str, origin: str) -> None:
        """Take a package and every module below it, each under a guard of its own."""
        with self._guard(name, origin):
            package = importlib.import_module(name)
            self._take(package, origin)
            for found in pkgutil.iter_modules(getattr(package, "__path__", ()), f"{name}."):
                self.take_package(found.name, origin)

    def take_entry_point(self, point: metadata.EntryPoint) -> None:
        """Take the module, or the object and its module, that an installed package declares."""
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"
        with self._guard(point.name, origin):
            self._take(point.load(), origin)

    def take_file(self, path: Path) -> None:
        """Take a single-file plugin; a second time does nothing.

        Raises:
            ConfigError: There is no such file.
            PluginError: It does not load.
        """
        if not path.is_file():
            raise ConfigError([Problem(None, "", f"there is no plugin file {show_path(path)}")])
        with self._guard(path.name, show_path(path)):
            self._take(_import_file(path.resolve()), show_path(path))
            return
        raise PluginError(str(self.broken.pop()))

    def report(self) -> str:
        """Return a line for each broken plugin; those of one origin with one error share it."""
        names: dict[tuple[str, str], list[str]] = {}
        for broken in self.broken:
            names.setdefault((broken.origin, broken.error), []).append(broken.name)
        return "\n".join(str(Broken(", ".join(some), *key)) for key, some in names.items())

    @contextmanager
    def _guard(self, name: str, origin: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            ours = isinstance(error, PluginError | DuplicateComponentError)
            text = str(error) if ours else f"{type(error).__name__}: {error}"
            self.broken.append(Broken(name, origin, text))

    def _take(self, plugin: object, origin: str) -> None:
        """Take all of a plugin, or nothing of it."""
        if self.manager.is_registered(plugin):
            return
        module = plugin if isinstance(plugin, ModuleType) else inspect.getmodule(plugin)
        _register(self.manager, plugin, f"{origin}: {getattr(plugin, '__name__', plugin)}")
        try:
            presets = self._shipped_presets(plugin)
            if module is not None:
                self.registry.collect(module, origin)
        except BaseException:
            self.manager.unregister(plugin)
            raise
        self.presets |= presets

    def _shipped_presets(self, plugin: object) -> dict[str, Path]:
        """Return the presets of one plugin, whose only hook may be the one that names them."""
        shipped: dict[str, Path] = {}
        for hook in self.manager.get_hookcallers(plugin) or ():
            if hook.name != "tangram_presets":
                raise PluginError(f"{hook.name} is for an observer, which a preset names; a module never hears it")
            for impl in hook.get_hookimpls():
                if impl.plugin is plugin:
                    shipped |= {Path(path).stem: Path(path) for path in _files(impl.function())}
        for name in shipped:
            if name in self.presets:
                raise PluginError(f"its preset '{name}' is there already: {show_path(self.presets[name])}")
        return shipped


def run_manager(observers: Mapping[str, object]) -> pluggy.PluginManager:
    """Return the manager of one run, on which its observers are registered by name.

    Raises:
        PluginError: A hook that does not exist, an argument that a hook does not have, a hook that is not
            marked, or one object under two names.
    """
    manager = _new_manager()
    for name, observer in observers.items():
        try:
            _register(manager, observer, name)
        except PluginError as error:
            raise PluginError(f"observer '{name}': {error}") from None
    return manager


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("tangram")
    manager.add_hookspecs(hookspecs)
    return manager


def _register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Register `plugin` if all its hooks are hooks."""
    known = [hook for hook in vars(hookspecs) if hook.startswith("tangram_")]
    for hook in known:
        method = getattr(plugin, hook, None)
        if inspect.isroutine(method) and manager.parse_hookimpl_opts(plugin, hook) is None:
            raise PluginError(f"{hook} is not marked @HOOKIMPL")
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except ValueError:
        raise PluginError("is registered already under another name") from None
    except pluggy.PluginValidationError as error:
        unknown = [hook.name for hook in manager.get_hookcallers(plugin) or () if not hook.has_spec()]
        if manager.is_registered(plugin):
            manager.unregister(plugin)
        if unknown:
            raise PluginError(f"there is no hook '{unknown[0]}'{suggest(unknown[0], known)}") from None
        raise PluginError("; ".join(str(error).splitlines()[1:])) from None


def _files(shipped: object) -> list[str | Path]:
    if not isinstance(shipped, list | tuple):
        raise PluginError(f"tangram_presets returned {shipped!r}, not a list of paths")
    return list(shipped)


def _import_file(path: Path) -> ModuleType:
    """Import a file once for the process, so that two experiments that name it share its classes."""
    name = f"tangram_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError("is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

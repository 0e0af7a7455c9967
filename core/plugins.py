"""Which plugins exist: found, imported one by one under a guard, and listed as broken where that fails.

A package says which tangram it needs by what it requires to be installed, `tangram-lm>=0.2`. That is checked before its
code is run, for a package may have been installed past its requirements.
"""

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType

import attrs
import pluggy
from attrs import frozen
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tangram.core import hookspecs
from tangram.core.config import ConfigError, Problem, show_path, suggest
from tangram.core.contracts import SLOTS
from tangram.core.registry import DuplicateComponentError, Mark, Registry, marked
from tangram.core.schema import fields

IN_TREE = "tangram"
"""Origin of what this distribution ships."""

SLOW = 1.0
"""Seconds past which an import is remarked on: every command waits for it."""

_US = "tangram-lm"

FILE_MODULE = "tangram_file_"
"""How the name of a single-file plugin's module begins."""


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


@frozen
class Remark:
    """A plugin that was taken, and something about it that its author should mend.

    Attributes:
        name: Module, entry point or file.
        origin: Who ships it, as in `Broken`.
        text: What it is.
    """

    name: str
    origin: str
    text: str

    def __str__(self) -> str:
        return f"{self.name} ({self.origin}) {self.text}"


class PluginError(Exception):
    """A plugin that the user names is broken."""


class Plugins:
    """What exists: the registry, the presets that ship, and what is broken.

    Attributes:
        registry: The components.
        manager: The process's pluggy manager. It knows plugin modules, and no observer of any run.
        presets: Preset files by name.
        files: SHA-256 of each single-file plugin that was taken, by its absolute path.
        broken: What could not be taken.
        remarks: What was taken and is not as it should be.
    """

    def __init__(self) -> None:
        self.registry = Registry()
        self.manager = _new_manager()
        self.presets: dict[str, Path] = {}
        self.files: dict[Path, str] = {}
        self.broken: list[Broken] = []
        self.remarks: list[Remark] = []

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
        for distribution in _declaring():
            plugins.take_distribution(distribution)
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

    def take_distribution(self, distribution: metadata.Distribution) -> None:
        """Take the modules, or the objects and their modules, that an installed package declares, each by itself."""
        _, origin = _origin(distribution)
        with self._guard("entry_points.txt", origin):
            for point in distribution.entry_points.select(group="tangram"):
                with self._guard(point.name, origin):
                    _check_version(distribution)
                    began = time.perf_counter()
                    self._remark(point.name, origin, self._take(point.load(), origin), time.perf_counter() - began)

    def take_file(self, path: Path) -> None:
        """Take a single-file plugin; a second time does nothing.

        Raises:
            ConfigError: There is no such file.
            PluginError: It does not load.
        """
        if path.resolve() in self.files:
            return
        if not path.is_file():
            raise ConfigError([Problem(None, "", f"there is no plugin file {show_path(path)}")])
        with self._guard(path.name, show_path(path)):
            began = time.perf_counter()
            taken = self._take(_import_file(path.resolve()), show_path(path))
            self._remark(path.name, show_path(path), taken, time.perf_counter() - began)
            self.files[path.resolve()] = sha256_of(path)
            return
        raise PluginError(str(self.broken.pop()))

    def stands_for(self, path: Path, sha256: str | None) -> bool:
        """Return whether a file that was taken is the one at `path`: itself, or one of that content or that name.

        If so, the one at `path` counts as taken from then on.
        """
        for file, found in list(self.files.items()):
            if file == path.resolve() or found == sha256 or file.name == path.name:
                self.files[path.resolve()] = found
                return True
        return False

    def report(self) -> str:
        """Return a line for each broken plugin; those of one origin with one error share it."""
        names: dict[tuple[str, str], list[str]] = {}
        for broken in self.broken:
            names.setdefault((broken.origin, broken.error), []).append(broken.name)
        return "\n".join(str(Broken(", ".join(some), *key)) for key, some in names.items())

    def _remark(self, name: str, origin: str, taken: Sequence[type], seconds: float) -> None:
        """Note that an import was slow, and the fields of what was taken whose meaning nobody wrote down."""
        if seconds > SLOW:
            text = f"took {seconds:.1f} s to import, for which every command waits"
            self.remarks.append(Remark(name, origin, f"{text}: import what is large where it is used"))
        for config in taken:
            silent = [field.name for field in fields(config) if not field.doc]
            if silent:
                text = f"does not document {', '.join(silent)} of {config.__name__}: add an `Attributes:` section"
                self.remarks.append(Remark(name, origin, text))

    @contextmanager
    def _guard(self, name: str, origin: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            ours = isinstance(error, PluginError | DuplicateComponentError)
            text = str(error) if ours else f"{type(error).__name__}: {error}"
            self.broken.append(Broken(name, origin, text))

    def _take(self, plugin: object, origin: str) -> list[type]:
        """Take all of a plugin, or nothing of it; return the config classes that are new."""
        if self.manager.is_registered(plugin):
            return []
        module = plugin if isinstance(plugin, ModuleType) else inspect.getmodule(plugin)
        _register(self.manager, plugin, f"{origin}: {getattr(plugin, '__name__', plugin)}")
        try:
            presets = self._shipped_presets(plugin)
            configs = list(marked(module)) if module is not None else []
            for mark, config in configs:
                _check_component(mark, config)
            if module is not None:
                self.registry.collect(module, origin)
        except BaseException:
            self.manager.unregister(plugin)
            raise
        self.presets |= presets
        return [config for _, config in configs]

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


def _declaring() -> Iterator[metadata.Distribution]:
    """Yield the installed distributions that declare plugins; of two of one name the first, which is imported."""
    seen: set[str] = set()
    for distribution in metadata.distributions():
        if _declares(distribution):
            name = canonicalize_name(_origin(distribution)[0])
            if name not in seen:
                seen |= {name} - {""}
                yield distribution


def _declares(distribution: metadata.Distribution) -> bool:
    try:
        return "[tangram]" in (distribution.read_text("entry_points.txt") or "")
    except UnicodeDecodeError:  # no one can say whose it is
        return False


def _origin(distribution: metadata.Distribution) -> tuple[str, str]:
    """Return the name, empty if the metadata do not say, and what messages call it: name and version, or the folder."""
    try:
        name, version = distribution.name, distribution.version
    except Exception:  # of several types, by how the metadata are damaged
        name = version = ""
    return name or "", f"{name} {version}" if name else f"a package without a name in {distribution.locate_file('.')}"


def _check_version(distribution: metadata.Distribution) -> None:
    """Check that `distribution` can do with the tangram that is installed.

    Raises:
        PluginError: It cannot.
    """
    for wanted in map(Requirement, distribution.requires or ()):
        if canonicalize_name(wanted.name) == _US and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            here = metadata.version(_US)
            if not wanted.specifier.contains(here, prereleases=True):
                raise PluginError(f"it needs {_US} {wanted.specifier}, and {here} is installed")


def _check_component(mark: Mark, config: type) -> None:
    """Check what every component must be.

    Raises:
        PluginError: It is not.
    """
    what = f"{mark.slot} '{mark.use}'"
    if mark.slot not in SLOTS:
        raise PluginError(f"{what}: there is no slot '{mark.slot}'{suggest(mark.slot, SLOTS)}")
    if not attrs.has(config):
        raise PluginError(f"{what}: {config.__name__} is no attrs class: mark it @frozen(kw_only=True)")
    if not callable(getattr(config, "build", None)):
        raise PluginError(f"{what}: {config.__name__} has no method build")
    attrs.resolve_types(config)  # a type that is not there


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


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _import_file(path: Path) -> ModuleType:
    """Import a file once for the process, so that two experiments that name it share its classes."""
    name = f"{FILE_MODULE}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
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

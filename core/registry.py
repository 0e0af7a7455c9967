"""Which config class fills which slot: an inert mark on the class, and the table that collects them."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import TypeVar

from attrs import frozen

_T = TypeVar("_T", bound=type)
_MARK = "__tangram_component__"


@frozen
class Mark:
    """What `@component` writes on a config class.

    Attributes:
        slot: The slot it fills.
        use: The name that a preset uses for it.
        capabilities: What it says that it can do beyond what every component of the slot must.
    """

    slot: str
    use: str
    capabilities: frozenset[str] = frozenset()


def component(slot: str, *, use: str, capabilities: Iterable[str] = ()) -> Callable[[_T], _T]:
    """Mark a config class as filling `slot` under the name `use`. Nothing is registered by this.

    Args:
        slot: The slot.
        use: The name.
        capabilities: What it can do that its slot leaves open, such as `cache` of an attention. The conformance kit
            holds it to what it declares, and knows which names a slot has.
    """

    def mark(cls: _T) -> _T:
        setattr(cls, _MARK, Mark(slot, use, frozenset(capabilities)))
        return cls

    return mark


def mark_of(cls: type) -> Mark | None:
    """Return the mark that `@component` left on `cls` itself, not on a base class."""
    mark = cls.__dict__.get(_MARK)
    return mark if isinstance(mark, Mark) else None


def marked(module: ModuleType) -> Iterator[tuple[Mark, type]]:
    """Yield every marked class that is defined in `module` itself."""
    for cls in dict.fromkeys(value for value in vars(module).values() if inspect.isclass(value)):
        mark = mark_of(cls)
        if mark is not None and cls.__module__ == module.__name__:
            yield mark, cls


@frozen
class Entry:
    """One line of the table: the mark, the config class, and where it came from."""

    mark: Mark
    config: type
    origin: str


class DuplicateComponentError(Exception):
    """Two components claim the same slot and name."""


class Registry:
    """The table (slot, use) -> config class. An instance; there is no global one."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}

    def collect(self, module: ModuleType, origin: str) -> list[Entry]:
        """Take every marked class that is defined in `module` itself; a class that is there already stays.

        Raises:
            DuplicateComponentError: A slot and name are taken, or claimed twice; the message names both
                origins, and nothing is taken.
        """
        found: dict[tuple[str, str], Entry] = {}
        for mark, cls in marked(module):
            key = (mark.slot, mark.use)
            taken = self._entries.get(key) or found.get(key)
            if taken is not None and taken.config is not cls:
                raise DuplicateComponentError(
                    f"{mark.slot} '{mark.use}' comes from {_place(cls, origin)} and from "
                    f"{_place(taken.config, taken.origin)}; rename one of them"
                )
            found[key] = taken or Entry(mark, cls, origin)
        self._entries.update(found)
        return list(found.values())

    def get(self, slot: str, use: str) -> Entry | None:
        """Return the entry, or None."""
        return self._entries.get((slot, use))

    def uses(self, slot: str) -> list[str]:
        """Return the names that fill `slot`, sorted."""
        return sorted(use for s, use in self._entries if s == slot)

    def __iter__(self) -> Iterator[Entry]:
        """Yield the entries, sorted by slot and name."""
        yield from (self._entries[key] for key in sorted(self._entries))


def _place(cls: type, origin: str) -> str:
    return f"{cls.__module__}.{cls.__qualname__} ({origin})"

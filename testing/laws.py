"""Laws: what a slot owes, stated once, and tried on any component, with pytest or without.

A contract is a class of laws. A subclass that names a config is a test class: for each law it gets a test of its
own, so that pytest collects it and Hypothesis draws the examples.

    class TestWindow(AttentionContract):
        config = WindowConfig(n_heads=2, window=4)

`examine` tries one law without pytest. A law ships the mutants that it must kill, components with one known fault:
`examine(..., mutant=...)` tries it on one.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from importlib import metadata
from typing import Any, ClassVar, TypeVar

import torch
from attrs import evolve, frozen
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption

from tangram.core.config import DEFAULT, ConfigError, Node
from tangram.core.context import BuildError
from tangram.core.plugins import Plugins
from tangram.core.registry import Registry, mark_of
from tangram.core.structuring import plain, structure
from tangram.testing.placing import placed
from tangram.testing.strategies import configs
from tangram.testing.yaml_line import yaml_line

_LAW = "__tangram_law__"

EXAMPLES: Mapping[str, int] = {"ci": 5, "full": 25}
"""Examples of a law by profile: `ci` for every change, `full` for `tangram check-plugin`."""

Mutant = Callable[[Any], Any]
"""Takes what a config builds and returns it with one known fault, which its name and first line tell."""

_C = TypeVar("_C", bound=Callable[..., None])
_T = TypeVar("_T")


@frozen(eq=False)
class Law:
    """One sentence that every component of a slot must make true.

    Attributes:
        check: The method of the contract that tries it; raises where it does not hold.
        draws: Strategies of the arguments of `check`, besides the config.
        requires: The capability without which it does not apply; empty for none.
        since: Minor version in which it came, such as `0.2`: until the next one it warns; empty for the first.
        kills: Mutants that it must notice.
        most: Most examples, whatever the profile: of a law that starts processes, and tries much in each.
    """

    check: Callable[..., None]
    draws: Mapping[str, st.SearchStrategy[Any]]
    requires: str = ""
    since: str = ""
    kills: tuple[Mutant, ...] = ()
    most: int = max(EXAMPLES.values())

    @property
    def name(self) -> str:
        """Name of the law."""
        return self.check.__name__

    @property
    def sentence(self) -> str:
        """The law in words."""
        return (self.check.__doc__ or "").strip().partition("\n")[0]

    def try_on(self, contract: "Contract", drawn: Mapping[str, Any]) -> None:
        """Try it on what was drawn, on the contract's device; raise where it does not hold."""
        self.check(contract, **{name: contract.placed(value) for name, value in drawn.items()})


def law(
    *,
    kills: Iterable[Mutant] = (),
    requires: str = "",
    since: str = "",
    most: int = max(EXAMPLES.values()),
    **draws: st.SearchStrategy[Any],
) -> Callable[[_C], _C]:
    """Mark a method of a contract as a law. It is called with `config` and one value of each of `draws`.

    Args:
        kills: Mutants that it must notice; a law about numbers has at least one.
        requires: The capability without which it does not apply.
        since: The minor version of tangram in which it came.
        most: Most examples, whatever the profile.
        **draws: Strategies by the name of the argument.
    """

    def mark(method: _C) -> _C:
        setattr(method, _LAW, Law(method, draws, requires, since, tuple(kills), most))
        return method

    return mark


@frozen
class Mutated:
    """A config that builds what another one does, with a fault."""

    config: Any
    mutant: Mutant

    def build(self, *args: object, **kwargs: object) -> object:
        """Build it and break it."""
        return self.mutant(self.config.build(*args, **kwargs))


def written(config: Any) -> Any:
    """Return the config as its author wrote it, also of a mutant."""
    return config.config if isinstance(config, Mutated) else config


class Contract:
    """The laws of a slot. A subclass gives `config`, and may say which laws are known to fail, with the reason.

    Attributes:
        slot: The slot.
        config: The config that is tried, or a config class, of which valid instances are drawn.
        optional: Capabilities that a component of the slot may declare, with what they mean.
        expected_failures: Reasons by law. A law that is expected to fail and holds is a failure.
        device: Where tensors are.
        dtype: Dtype of the products.
        profile: Key of `EXAMPLES`.
    """

    slot: ClassVar[str] = ""
    config: ClassVar[Any]
    optional: ClassVar[Mapping[str, str]] = {}
    expected_failures: ClassVar[Mapping[str, str]] = {}
    device: ClassVar[str] = "cpu"
    dtype: ClassVar[torch.dtype] = torch.float64
    profile: ClassVar[str] = "ci"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "config" not in vars(cls):
            return
        known = {each.name: each for each in cls.laws()}
        for name in cls.expected_failures:
            if name not in known:
                raise TypeError(f"{cls.__name__}: there is no law '{name}'; the laws are {', '.join(known)}")
        for each in known.values():
            setattr(cls, f"test_{each.name}", _test(cls, each))

    @classmethod
    def laws(cls) -> Iterator[Law]:
        """Yield the laws in the order of their classes and lines."""
        found: dict[str, Law] = {}
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                marked = getattr(value, _LAW, None)
                if isinstance(marked, Law):
                    found[name] = marked
        yield from found.values()

    @classmethod
    def config_class(cls) -> type:
        """Return the class of the config that is tried."""
        return cls.config if isinstance(cls.config, type) else type(cls.config)

    @classmethod
    def capabilities(cls) -> frozenset[str]:
        """Return what the component declares."""
        mark = mark_of(cls.config_class())
        return frozenset() if mark is None else mark.capabilities

    @classmethod
    def subjects(cls) -> st.SearchStrategy[Any]:
        """Return the configs to try: the one that is given, or small valid ones of the class."""
        if not isinstance(cls.config, type):
            return st.just(cls.config)
        return configs(cls.config, cls.parts(), few=2).map(cls._that_builds)

    @classmethod
    def parts(cls) -> Mapping[str, st.SearchStrategy[Any]]:
        """Return strategies by field name for fields whose type does not say enough, such as a nested component."""
        return {}

    @classmethod
    def _that_builds(cls, config: object) -> object:
        try:
            with torch.device("meta"):
                cls.make(config)
        except (BuildError, ValueError):
            reject()
        return config

    @classmethod
    def make(cls, config: Any) -> Any:
        """Return what the config builds, in small surroundings; only the contract of its slot knows how."""
        raise NotImplementedError

    @classmethod
    def placed(cls, value: _T) -> _T:
        """Return tensors, in a record or tuple too, or a module on the contract's device."""
        return placed(value, cls.device)

    @law()
    def every_field_is_documented(self, config: object) -> None:
        """Every field of the config has a line under `Attributes:`."""
        from tangram.core.schema import fields

        silent = [each.name for each in fields(self.config_class()) if not each.doc]
        assert not silent, f"add a line under `Attributes:` for {', '.join(silent)}"

    @law()
    def a_preset_can_say_its_config(self, config: Any) -> None:
        """Written into a preset and read back, the config is the same; a key that it does not have is refused."""
        said = plain(written(config))
        assert isinstance(said, dict)
        read: Any = structure(Node.of(said, DEFAULT), self.config_class(), _registry())
        assert read == written(config), f"read back it is {read}"
        try:
            structure(Node.of({**said, "no_such_key": 1}, DEFAULT), self.config_class(), _registry())
        except ConfigError:
            return
        raise AssertionError("a key that it does not have is taken")

    @law()
    def what_it_declares_is_known(self, config: object) -> None:
        """Every declared capability is one that the slot knows."""
        unknown = sorted(self.capabilities() - self.optional.keys())
        assert not unknown, f"{self.slot} knows no capability {', '.join(unknown)}; it has {', '.join(self.optional)}"


@cache
def _registry() -> Registry:
    return Plugins.discover().registry


def _test(contract: type[Contract], tried: Law) -> Callable[[Contract], None]:
    """Return the test of a law for pytest."""

    def check(self: Contract, **drawn: Any) -> None:
        tried.try_on(self, drawn)

    check.__name__ = check.__qualname__ = f"test_{tried.name}"
    check.__doc__ = tried.sentence
    examples = _settings(min(EXAMPLES[contract.profile], tried.most))
    drawing = examples(given(**_draws(contract, tried))(check))
    if tried.requires and tried.requires not in contract.capabilities():
        return _skipping(tried, f"not applicable: it does not declare '{tried.requires}'")
    if tried.name in contract.expected_failures:
        return _expecting(tried, drawing, contract.expected_failures[tried.name])
    return _warning(tried, drawing) if _is_new(tried, contract) else drawing


def _skipping(tried: Law, reason: str) -> Callable[[Contract], None]:
    def test(self: Contract) -> None:
        import pytest

        pytest.skip(reason)

    return test


def _expecting(tried: Law, drawing: Callable[[Contract], None], reason: str) -> Callable[[Contract], None]:
    def test(self: Contract) -> None:
        import pytest

        try:
            drawing(self)
        except Exception:
            pytest.xfail(reason)
        pytest.fail(f"{tried.name} is expected to fail ({reason}), and holds: remove it from expected_failures")

    return test


def _warning(tried: Law, drawing: Callable[[Contract], None]) -> Callable[[Contract], None]:
    def test(self: Contract) -> None:
        try:
            drawing(self)
        except Exception as error:
            warnings.warn(
                f"{tried.name}, new in {tried.since}, will fail from the next version on: {error}", stacklevel=2
            )

    return test


def _is_new(tried: Law, contract: type[Contract]) -> bool:
    """Return whether a law only warns: it came with this minor version, and the component is another distribution's."""
    ours = contract.config_class().__module__.startswith("tangram.plugins.")
    here = metadata.version("tangram-lm").rpartition(".")[0]
    return bool(tried.since) and not ours and tried.since == here


def _settings(examples: int) -> settings:
    borne = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    borne.append(HealthCheck.differing_executors)  # a contract keeps nothing: a law tried again may have a new one
    return settings(max_examples=examples, deadline=None, print_blob=True, suppress_health_check=borne)


def _draws(contract: type[Contract], tried: Law, mutant: Mutant | None = None) -> dict[str, st.SearchStrategy[Any]]:
    subjects = contract.subjects()
    if mutant is not None:
        subjects = subjects.map(lambda config: Mutated(config, mutant))
    return {"config": subjects, **tried.draws}


class Status(Enum):
    """What became of a law."""

    HOLDS = "holds"
    FAILS = "fails"
    WARNS = "warns"
    NOT_APPLICABLE = "not applicable"
    EXPECTED = "fails as expected"


@frozen
class Finding:
    """What became of one law.

    Attributes:
        law: Name of the law.
        sentence: The law in words.
        status: What became of it.
        seconds: How long it took.
        why: What went wrong, or why it was not tried; empty where it holds.
        example: The smallest example that breaks it, one line of YAML.
        blob: What reproduces that example, a decorator of Hypothesis.
    """

    law: str
    sentence: str
    status: Status
    seconds: float = 0.0
    why: str = ""
    example: str = ""
    blob: str = ""

    @property
    def bad(self) -> bool:
        """Whether the component does not conform."""
        return self.status is Status.FAILS


def examine(contract: type[Contract], tried: Law, *, mutant: Mutant | None = None) -> Finding:
    """Try one law, on the contract's component or on a mutant of it."""
    empty = Finding(tried.name, tried.sentence, Status.HOLDS)
    if tried.requires and tried.requires not in contract.capabilities():
        return evolve(empty, status=Status.NOT_APPLICABLE, why=f"it does not declare '{tried.requires}'")
    drawn: dict[str, Any] = {}

    def check(**values: Any) -> None:
        drawn.clear()
        drawn.update(values)
        tried.try_on(contract(), values)

    check.__name__ = tried.name
    # That a mutant is killed is enough; how small the example is, is not.
    phases = [Phase.generate] if mutant is not None else [Phase.generate, Phase.shrink]
    shown = settings(
        _settings(min(EXAMPLES[contract.profile], tried.most)), database=None, report_multiple_bugs=False, phases=phases
    )
    began = time.perf_counter()
    try:
        shown(given(**_draws(contract, tried, mutant))(check))()
    except Exception as error:
        found = _found(tried, contract, error, drawn)
        return evolve(empty, seconds=time.perf_counter() - began, **found)
    took = time.perf_counter() - began
    reason = contract.expected_failures.get(tried.name)
    if reason is not None:
        return evolve(empty, status=Status.FAILS, seconds=took, why=f"expected to fail ({reason}), and holds")
    return evolve(empty, seconds=took)


def _found(tried: Law, contract: type[Contract], error: Exception, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the finding of a law that does not hold."""
    if isinstance(error, UnsatisfiedAssumption):
        error = ValueError("no valid config could be drawn: give the contract one, as `config`")
    notes = [note.strip() for note in getattr(error, "__notes__", ())]
    blobs = [note for note in notes if "@reproduce_failure" in note]
    blob = blobs[0][blobs[0].index("@reproduce_failure") :].partition(" as ")[0] if blobs else ""
    why = f"{error}" if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    expected = contract.expected_failures.get(tried.name)
    status = Status.EXPECTED if expected else Status.WARNS if _is_new(tried, contract) else Status.FAILS
    return {
        "status": status,
        "why": expected or why or "an assertion failed",
        "example": yaml_line(drawn),
        "blob": blob,
    }

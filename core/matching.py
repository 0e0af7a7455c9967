"""What the variants of a study have in common: tokens, operations, time or parameters, made equal before training.

A residual of more than `MOST` is refused, for then the study would compare budgets and not pieces.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import attrs
from attrs import evolve, frozen

from tangram.core.assembly import laid_out
from tangram.core.config import ConfigError, Node, Origin, Plain, Problem, override
from tangram.core.context import BuildError
from tangram.core.curve import Curve
from tangram.core.experiment import Experiment
from tangram.core.measure import Measures, measure
from tangram.core.pace import Pace
from tangram.core.study import Study, Variant

MOST = 0.02
"""The largest residual."""

_STEPS, _FAR = 200, 2**40
"""Where the search for a whole number gives up: after so many tries, or beyond that number."""

_ORIGIN = Origin("match")


@frozen
class Budget:
    """What a variant costs.

    Attributes:
        tokens: Tokens it trains on.
        measures: What its model costs.
    """

    tokens: int
    measures: Measures

    @property
    def flops(self) -> int:
        """Operations of the training, objectives beyond the next token not counted."""
        return self.tokens * self.measures.training_flops_per_token

    @property
    def parameters(self) -> int:
        """Parameters of the main model."""
        return self.measures.parameters.total


@frozen(eq=False)
class Matched:
    """A study whose variants are comparable.

    Attributes:
        study: The study, its variants changed where the matching demanded it.
        budgets: What each variant costs, by name.
        statement: What was made equal, and how.
        residuals: What is left of the difference to the base, relative, by variant.
    """

    study: Study
    budgets: Mapping[str, Budget]
    statement: str
    residuals: Mapping[str, float]


def matched(study: Study, trial: Callable[[Variant], Pace | None]) -> Matched:
    """Return the study with its variants made equal in what it names.

    Args:
        study: The study as written.
        trial: Measures how fast a variant trains here; asked only where time is matched.

    Raises:
        ConfigError: A residual is over `MOST`, two variants have become one, or one cannot be built.
    """
    match, base = study.asked.match, study.base
    if match.on == "parameters":
        target = budget_of(base).parameters
        variants = [_solved(study, variant, match.by, target) for variant in study.variants[1:]]
        statement = f"Equal parameters of the main model, by solving {match.by} in every variant; and equal tokens."
    elif match.on == "flops":
        variants = [_as_many_flops(study, variant) for variant in study.variants[1:]]
        statement = "Equal training operations of the main model, by the tokens of each variant."
    elif match.on == "time":
        paces = [_tried(trial, variant) for variant in study.variants]
        variants = [
            _lasting(study, variant, pace / paces[0])
            for variant, pace in zip(study.variants[1:], paces[1:], strict=True)
        ]
        statement = "Equal time, by the tokens of each variant: as many more as it was faster in a trial."
    else:
        variants = list(study.variants[1:])
        statement = "Equal tokens."
    if match.on in ("flops", "time"):
        statement += " Curves over tokens or steps are stretched with the run, as the differences show."
    changed = evolve(study, variants=(base, *variants))
    changed.refuse_equals()
    budgets = {variant.name: budget_of(variant) for variant in changed.variants}
    return Matched(changed, budgets, statement, _checked(changed, budgets))


def budget_of(variant: Variant) -> Budget:
    """Return what a variant costs.

    Raises:
        ConfigError: It cannot be built.
    """
    return variant.building(lambda: Budget(tokens_of(variant.experiment), measure(variant.experiment)))


def tokens_of(experiment: Experiment) -> int:
    """Return the tokens that a run trains on: whole steps, until there are enough."""
    return sum(laid_out(experiment)) * experiment.train.sequence_length


def _checked(study: Study, budgets: Mapping[str, Budget]) -> dict[str, float]:
    """Return the residuals of what is matched; time has none before it is measured."""
    on = study.asked.match.on
    if on == "time":
        return {}
    base = budgets[study.base.name]
    residuals = {}
    problems = []
    for variant in study.variants[1:]:
        budget = budgets[variant.name]
        pairs = {
            "tokens": (budget.tokens, base.tokens),
            "flops": (budget.flops, base.flops),
            "parameters": (budget.parameters, base.parameters),
        }
        residuals[variant.name] = pairs[on][0] / pairs[on][1] - 1
        for name in {on, "tokens"} if on == "parameters" else {on}:
            here, there = pairs[name]
            if abs(here / there - 1) > MOST:
                text = f"'{variant.name}' has {here:,} {name} and the base {there:,}: {here / there - 1:+.1%}"
                problems.append(Problem(_origin(variant), "match", f"{text}, more than {MOST:.0%} apart"))
        if on == "flops" and budget.measures.parameters.mtp != base.measures.parameters.mtp:
            text = f"'{variant.name}' has other objectives, whose operations are not counted; match tokens or time"
            problems.append(Problem(_origin(variant), "match", text))
    if problems:
        raise ConfigError(problems)
    return residuals


def _origin(variant: Variant) -> Origin | None:
    written = [patch.origin for patch in variant.patches if patch.origin != _ORIGIN]
    return written[-1] if written else None


# --- parameters ---------------------------------------------------------------------------------------------


def _solved(study: Study, variant: Variant, path: str, target: int) -> Variant:
    """Return the variant with the whole number at `path` at which its parameters are closest to `target`."""
    start = _value(variant.experiment, path)
    if start is None:
        text = f"'{variant.name}' has no whole number above 0 at {path} to solve for"
        raise ConfigError([Problem(_origin(variant), "match.by", text)])

    @cache
    def off(value: int) -> int | None:
        """Return by how many parameters `value` misses; None where a component refuses it."""
        try:
            changed = study.with_patch(variant, override(f"{path}={value}"))
            return measure(changed.experiment).parameters.total - target
        except (BuildError, ConfigError):
            return None

    best = closest(off, start)
    if best is None:
        raise ConfigError([Problem(_origin(variant), "match.by", f"no value of {path} builds '{variant.name}'")])
    return study.with_patch(variant, _at(path, best))


def _value(experiment: Experiment, path: str) -> int | None:
    from tangram.core.presets import flatten

    value = flatten(experiment).get(path)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def closest(off: Callable[[int], int | None], start: int) -> int | None:
    """Return the whole number above 0 at which `off`, which grows, is closest to 0; None where it is None everywhere.

    Args:
        off: How far a number misses; None for one that is not allowed, as an odd width of a rotation.
        start: A number to begin at.
    """
    known = _near(off, start, 1, _FAR)
    if known is None:
        return None
    low = high = known
    while _miss(off, low) > 0 and (below := _near(off, max(1, low // 2), 1, low - 1)) is not None:
        high, low = low, below
    while _miss(off, high) < 0 and (above := _near(off, 2 * high, high + 1, _FAR)) is not None:
        low, high = high, above
    while (middle := _near(off, (low + high) // 2, low + 1, high - 1)) is not None:
        low, high = (middle, high) if _miss(off, middle) <= 0 else (low, middle)
    return min((low, high), key=lambda value: abs(_miss(off, value)))


def _miss(off: Callable[[int], int | None], value: int) -> int:
    missed = off(value)
    assert missed is not None
    return missed


def _near(off: Callable[[int], int | None], wanted: int, low: int, high: int) -> int | None:
    """Return the allowed number from `low` to `high` that is nearest to `wanted`, if one is near."""
    for distance in range(_STEPS):
        for value in dict.fromkeys((wanted - distance, wanted + distance)):
            if low <= value <= high and off(value) is not None:
                return value
        if wanted - distance < low and wanted + distance > high:
            return None
    return None


# --- tokens -------------------------------------------------------------------------------------------------


def _tried(trial: Callable[[Variant], Pace | None], variant: Variant) -> float:
    found = variant.building(lambda: trial(variant))
    if found is None:
        text = f"'{variant.name}' is too large to try on this machine; match tokens, flops or parameters"
        raise ConfigError([Problem(_origin(variant), "match", text)])
    return found.tokens_per_second


def _as_many_flops(study: Study, variant: Variant) -> Variant:
    wanted = budget_of(study.base).flops
    here = budget_of(variant)
    return _lasting(study, variant, wanted / here.flops * here.tokens / tokens_of(study.base.experiment))


def _lasting(study: Study, variant: Variant, factor: float) -> Variant:
    """Return the variant trained on `factor` times as many tokens as the base, its curves stretched with it."""
    experiment = variant.experiment
    wanted = factor * tokens_of(study.base.experiment)
    stretch = wanted / tokens_of(experiment)
    last = next(laid_out(experiment)) * experiment.train.sequence_length
    # A run ends with the step that reaches its tokens: half a step less makes it end with the nearest.
    tokens = max(1, round(wanted - last / 2))
    if tokens_of(experiment) == tokens_of(evolve(experiment, train=evolve(experiment.train, tokens=tokens))):
        return variant
    changed = study.with_patch(variant, _at("train.tokens", tokens))
    for path, curve in curves_in(experiment):
        longer = curve.stretched(stretch)
        if longer != curve:
            changed = study.with_patch(changed, _at(path, longer.dump()))  # type: ignore[arg-type]
    return changed


def curves_in(value: Any, path: str = "") -> Iterator[tuple[str, Curve]]:
    """Yield every curve in a tree of configs with its dotted path."""
    if isinstance(value, Curve):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from curves_in(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from curves_in(item, f"{path}.{i}")
    elif attrs.has(type(value)):
        for field in attrs.fields(type(value)):
            yield from curves_in(getattr(value, field.name), f"{path}.{field.alias}".lstrip("."))


def _at(path: str, value: Plain) -> Node:
    """Return the patch that puts a value at a dotted path."""
    for step in reversed(path.split(".")):
        value = {step: value}
    return Node.of(value, _ORIGIN)

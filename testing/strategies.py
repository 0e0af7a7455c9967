"""Hypothesis strategies: draw shapes, seeds, configs and presets; tensors are filled from a seeded generator."""

import json
import math
import re
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs
import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.config import ConfigError
from tangram.core.curve import Curve
from tangram.core.experiment import Experiment
from tangram.core.plugins import Plugins
from tangram.core.presets import available, load_preset, resolve
from tangram.core.records import IGNORE, Batch
from tangram.core.registry import mark_of
from tangram.core.structuring import plain

_T = TypeVar("_T")

Size: TypeAlias = int | st.SearchStrategy[int]
"""A size, or what draws one."""

_SPAN = 16
"""How far an integer reaches from its bound where nothing bounds it on the other side: builds stay small."""

_COLLECTIONS = ("objectives", "observers")

_ROWS = st.integers(1, 3)
_COLUMNS = st.integers(2, 12)


def seeds() -> st.SearchStrategy[int]:
    """Return seeds for a `torch.Generator`."""
    return st.integers(0, 2**31 - 1)


def _size(draw: st.DrawFn, size: Size) -> int:
    return size if isinstance(size, int) else draw(size)


@st.composite
def hidden(
    draw: st.DrawFn,
    batch: Size,
    length: Size,
    dim: Size,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Tensor:
    """Draw normal hidden states [batch, length, dim] of standard deviation `scale`."""
    shape = [_size(draw, size) for size in (batch, length, dim)]
    generator = torch.Generator().manual_seed(draw(seeds()))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def _documents(draw: st.DrawFn, length: int) -> Tensor:
    """Draw the segments [length] of one row: documents numbered from 0."""
    starts = draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))
    return torch.tensor([0, *starts], dtype=torch.int64).cumsum(0)


@st.composite
def batches(
    draw: st.DrawFn,
    vocab_size: int,
    *,
    sequences: Size = _ROWS,
    length: Size = _COLUMNS,
    isolated: bool | None = None,
) -> Batch:
    """Draw a batch that is all of its global batch, packed as data components pack.

    Isolated rows number their documents, restart positions at each, and predict nothing across a boundary;
    the others are one segment. The last row may end in padding, whose targets are `IGNORE`. One target at
    least is kept.

    Args:
        draw: Given by Hypothesis.
        vocab_size: Tokens are drawn below it.
        sequences: Rows B.
        length: Positions S of a row.
        isolated: Whether documents are isolated; by default drawn.
    """
    n_rows, n_columns = _size(draw, sequences), _size(draw, length)
    isolate = draw(st.booleans()) if isolated is None else isolated
    generator = torch.Generator().manual_seed(draw(seeds()))
    windows = torch.randint(vocab_size, (n_rows, n_columns + 1), generator=generator)
    targets = windows[:, 1:].clone()
    columns = torch.arange(n_columns)
    segments = torch.zeros(n_rows, n_columns, dtype=torch.int64)
    positions = columns.repeat(n_rows, 1)
    if isolate:
        segments = torch.stack([_documents(draw, n_columns) for _ in range(n_rows)])
        first = torch.ones_like(segments, dtype=torch.bool)
        first[:, 1:] = segments.diff(dim=1) > 0
        positions = columns - torch.where(first, columns, 0).cummax(1).values
        targets[:, :-1][first[:, 1:]] = IGNORE
    padding = draw(st.integers(0, n_columns - 1))
    padded = targets.clone()
    padded[-1, n_columns - padding :] = IGNORE
    targets = padded if bool((padded != IGNORE).any()) else targets
    return Batch(
        tokens=windows[:, :-1].contiguous(),
        targets=targets,
        positions=positions,
        segments=segments,
        n_targets=int((targets != IGNORE).sum()),
        n_sequences=n_rows,
    )


@st.composite
def curves(draw: st.DrawFn, low: float = 0.0, high: float = 1.0) -> Curve:
    """Draw a curve with values in [low, high]: a number, or pieces that end at steps and then at tokens."""
    values = st.floats(low, high, allow_subnormal=False)
    pieces: list[dict[str, float | int | str]] = []
    for unit, largest in (("until_step", 10**4), ("until", 15 * 10**12)):
        ends = sorted(draw(st.sets(st.integers(1, largest), max_size=2)))
        for i, end in enumerate(ends):
            piece: dict[str, float | int | str] = {unit: end}
            # A ramp begins where the piece before ended, which must be known in the ramp's own unit.
            if (i > 0 or not pieces) and draw(st.booleans()):
                shape = draw(st.sampled_from(("linear", "cosine")))
                piece |= {"from": draw(values), "to": draw(values), "shape": shape}
            else:
                piece |= {"value": draw(values)}
            pieces.append(piece)
    last = draw(values)
    return Curve.parse([*pieces, {"value": last}] if pieces else last)


@st.composite
def configs(
    draw: st.DrawFn,
    config: type[_T],
    overrides: Mapping[str, st.SearchStrategy[object]] | None = None,
    *,
    few: int | None = None,
) -> _T:
    """Draw a valid instance of an attrs config class.

    Booleans, numbers, strings and Literals are drawn within the bounds of the field's validators (`ge`, `gt`,
    `le`, `lt`, `in_`, and these under `and_` and `optional`). A required field that is a curve or another
    attrs class is drawn in turn; a field of any other type keeps its default. What the class itself refuses,
    with a ValueError, is not drawn.

    Args:
        draw: Given by Hypothesis.
        config: The class.
        overrides: Strategies by field name, for fields whose type does not say enough.
        few: How many fields at most leave their default; by default any number. Fields often have to fit each
            other, and defaults do.

    Raises:
        TypeError: A required field has a type that is not known here, or an override names no field.
    """
    given = overrides or {}
    fields = {field.name: field for field in _fields(config)}
    unknown = sorted(given.keys() - fields.keys())
    if unknown:
        raise TypeError(f"{config.__name__} has no field {', '.join(unknown)}")
    hints = get_type_hints(config)
    values = {}
    left: set[str] = set()
    if few is not None:
        optional = [name for name, field in fields.items() if field.default is not attrs.NOTHING]
        left = set(optional) - set(draw(st.lists(st.sampled_from(optional), max_size=few)) if optional else ())
    for name, field in fields.items():
        if name in left:
            continue
        strategy = given.get(name)
        if strategy is None:
            strategy = _of_type(hints[name], _Bounds.of(field.validator), field.default is attrs.NOTHING)
        if strategy is not None:
            values[field.alias] = draw(strategy)
        elif field.default is attrs.NOTHING:
            raise TypeError(
                f"{config.__name__}.{name} is required, of type {hints[name]}: give its strategy in overrides"
            )
    try:
        return config(**values)
    except ValueError:
        reject()


def presets(most: int = 4) -> st.SearchStrategy[tuple[str, ...]]:
    """Return the arguments of `load_preset`: a preset that ships with tangram or a plugin, and overrides of it.

    An override sets one field within the bounds of its validators (as `configs` does; free texts and lists stay as
    they are), puts another component into a slot, or removes an entry of `objectives` or `observers`. No override
    reaches what another one writes, so their order says nothing. What `load_preset` refuses is not drawn.

    Args:
        most: Largest number of overrides.
    """
    return _presets(Plugins.discover(), most)


@st.composite
def _presets(draw: st.DrawFn, plugins: Plugins, most: int) -> tuple[str, ...]:
    name = draw(st.sampled_from(sorted(available(plugins))))
    written: dict[str, str] = {}
    for path, values in draw(st.lists(st.sampled_from(_places(name)), max_size=most)):
        # A group is a patch on the block, so what is written to both may meet.
        reach = re.sub(r"^model\.blocks\.[0-9]+", "model.block", path) + "."
        if not any(reach.startswith(other) or other.startswith(reach) for other in written):
            written[reach] = f"{path}={json.dumps(plain(draw(values)))}"
    try:
        resolve(name, tuple(written.values()), plugins)
    except ConfigError:
        reject()
    return name, *written.values()


@cache
def _shipped(name: str) -> Experiment:
    return load_preset(name)


@cache
def _places(name: str) -> tuple[tuple[str, st.SearchStrategy[object]], ...]:
    """Return where a shipped preset can be overridden, by dotted path, and with what."""
    places: list[tuple[str, st.SearchStrategy[object]]] = []
    for path, config in _configs_of(_shipped(name), ()):
        mark, hints = mark_of(type(config)), get_type_hints(type(config))
        if mark is not None:
            others: st.SearchStrategy[object] = st.sampled_from(_components()[mark.slot])
            removable = len(path) == 2 and path[0] in _COLLECTIONS
            places.append((".".join(path), st.none() | others if removable else others))
        for field in _fields(type(config)):
            hint, bounds = hints[field.name], _Bounds.of(field.validator)
            values = _of_type(hint, bounds, required=hint is Curve)
            if values is not None and (hint is not str or bounds.options):
                places.append((".".join((*path, field.alias)), values))
    return tuple(places)


@cache
def _components() -> Mapping[str, list[object]]:
    """Return what can fill each slot: the components of the shipped presets, and those that need no setting."""
    plugins = Plugins.discover()
    named = [config for name in available(plugins) for _, config in _configs_of(_shipped(name), ())]
    classes = [entry.config for entry in plugins.registry]
    free = [cls() for cls in classes if all(f.default is not attrs.NOTHING for f in _fields(cls))]
    found: dict[str, list[object]] = {}
    for config in (*named, *free):
        mark = mark_of(type(config))
        if mark is not None and config not in found.setdefault(mark.slot, []):
            found[mark.slot].append(config)
    return found


def _fields(config: type) -> list[Any]:
    """Return the fields of an attrs class that its preset may say."""
    return [field for field in attrs.fields(config) if field.init]


def _configs_of(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield every config inside `value`, with its path."""
    parts: Mapping[str, object] = {}
    if isinstance(value, Mapping):
        parts = value
    elif isinstance(value, tuple):
        parts = {str(i): item for i, item in enumerate(value)}
    elif attrs.has(type(value)) and not isinstance(value, Curve):
        yield path, value
        parts = {field.alias: getattr(value, field.name) for field in _fields(type(value))}
    for key, part in parts.items():
        yield from _configs_of(part, (*path, key))


def _validators(validator: object) -> Iterator[object]:
    """Yield the validators that `and_` and `optional` hold, which attrs keeps in private classes."""
    match type(validator).__name__:
        case "_AndValidator":
            for part in getattr(validator, "_validators", ()):
                yield from _validators(part)
        case "_OptionalValidator":
            yield from _validators(getattr(validator, "validator", None))
        case _:
            yield validator


@attrs.define
class _Bounds:
    """What a field's validators demand of a value."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    options: tuple[object, ...] | None = None

    @classmethod
    def of(cls, validator: object) -> "_Bounds":
        """Read the validators."""
        bounds = cls()
        for each in _validators(validator):
            if type(each).__name__ == "_InValidator":
                bounds.options = tuple(getattr(each, "options", ()))
            elif type(each).__name__ == "_NumberValidator":
                bounds._narrow(getattr(each, "compare_op", ""), getattr(each, "bound", math.nan))
        return bounds

    def _narrow(self, operator: str, bound: float) -> None:
        strict = operator in ("<", ">")
        if operator in (">", ">=") and (bound, strict) > (self.low, self.above):
            self.low, self.above = bound, strict
        if operator in ("<", "<=") and (-bound, strict) > (-self.high, self.below):
            self.high, self.below = bound, strict

    def integers(self) -> st.SearchStrategy[int]:
        """Return the integers within, at most `_SPAN` from the nearer bound."""
        low = None if math.isinf(self.low) else math.floor(self.low) + 1 if self.above else math.ceil(self.low)
        high = None if math.isinf(self.high) else math.ceil(self.high) - 1 if self.below else math.floor(self.high)
        if low is None:
            low = -_SPAN if high is None else high - _SPAN
        return st.integers(low, low + _SPAN if high is None else high)

    def floats(self) -> st.SearchStrategy[float]:
        """Return the finite floats within."""
        return st.floats(
            None if math.isinf(self.low) else self.low,
            None if math.isinf(self.high) else self.high,
            exclude_min=self.above,
            exclude_max=self.below,
            allow_nan=False,
            allow_infinity=False,
            allow_subnormal=False,
        )


def _of_type(hint: object, bounds: _Bounds, required: bool) -> st.SearchStrategy[object] | None:
    """Return the strategy of a type within bounds; None where the type does not say enough."""
    if bounds.options is not None:
        return st.sampled_from(bounds.options)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_of_type(part, bounds, required) for part in get_args(hint)]
        known = [part for part in parts if part is not None]
        return st.one_of(known) if len(known) == len(parts) else None
    if hint is type(None):
        return st.none()
    if hint is bool:
        return st.booleans()
    if hint is int:
        return bounds.integers()
    if hint is float:
        return bounds.floats()
    if hint is str:
        return st.text(st.characters(codec="utf-8"))
    if hint is Curve:
        return curves() if required else None
    if required and isinstance(hint, type) and attrs.has(hint):
        return configs(hint)
    return None

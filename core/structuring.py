"""A tree of nodes to attrs configs and back: strict, and with everything that is wrong told at once.

cattrs chooses by type. The hooks here collect errors, each noted with the step that leads to it, and
`structure` turns them into problems that name the line where the user wrote the value.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args, get_origin

import attrs
import cattrs
from cattrs.cols import is_mapping
from cattrs.errors import (
    BaseValidationError,
    IterableValidationError,
    IterableValidationNote,
    StructureHandlerNotFoundError,
)

from tangram.core.config import ConfigError, Node, Plain, Problem, describe, suggest
from tangram.core.contracts import SLOTS
from tangram.core.curve import Curve, CurveError
from tangram.core.registry import Registry, mark_of

_T = TypeVar("_T")
_Path: TypeAlias = tuple[str | int, ...]
_Part: TypeAlias = tuple[str | int, object, Any]
"""A step, the raw value there, and the type it shall have (a class or a form of `typing`)."""

_RENDERED = [
    (re.compile(pattern, re.DOTALL), template)
    for pattern, template in (
        (r"'\w+' must be (\S+ \S+): (.*)", r"must be \1, got \2"),
        (r"Length of '\w+' must be (\S+ \S+): (.*)", r"must have a length \1, got \2"),
        (r"'\w+' must be in [\[({](.*?),?[\])}] \(got (.*)\)", r"must be one of \1, got \2"),
        (r"'\w+' (must .*)", r"\1"),
    )
]
"""What the validators of attrs say, and what a person reads."""


class UnknownUseError(ConfigError):
    """Among the problems is a component that does not exist."""


class _NoComponentError(ValueError):
    """No component of that name fills the slot."""


def structure(tree: Node, cls: type[_T], registry: Registry) -> _T:
    """Return the `cls`, a config or a slot's contract, that `tree` describes.

    Raises:
        ConfigError: With all problems; `UnknownUseError` if one is a component that `registry` does not have.
    """
    try:
        return _converter(registry).structure(tree.plain(), cls)
    except Exception as error:
        leaves = list(_leaves(error, ()))
        unknown_use = any(isinstance(leaf, _NoComponentError) for _, leaf in leaves)
        raise (UnknownUseError if unknown_use else ConfigError)(_problems(tree, leaves)) from None


def plain(value: object) -> Plain:
    """Return what `structure` reads back as `value`, with every default spelled out."""
    return cast(Plain, _UNSTRUCTURE.unstructure(value))


# --- reading ----------------------------------------------------------------------------------------------


def _converter(registry: Registry) -> cattrs.Converter:
    converter = cattrs.Converter()
    # Registered by type: cattrs silently prefers its own primitives to hooks registered by predicate.
    converter.register_structure_hook(int, lambda raw, _: _int(raw))
    converter.register_structure_hook(float, lambda raw, _: _float(raw))
    converter.register_structure_hook(str, lambda raw, _: _exactly(raw, str, "a string"))
    converter.register_structure_hook(bool, lambda raw, _: _exactly(raw, bool, "true or false"))
    converter.register_structure_hook(Curve, lambda raw, _: Curve.parse(raw))
    slots = {contract: slot for slot, contract in SLOTS.items()}

    def hook(when: Callable[[Any], bool], read: Callable[[Any, object], object]) -> None:
        converter.register_structure_hook_func(when, lambda raw, wanted: read(wanted, raw))

    hook(lambda t: get_origin(t) is Literal, _literal)
    hook(lambda t: get_origin(t) in (tuple, list, Sequence), lambda t, raw: _sequence(converter, t, raw))
    hook(is_mapping, lambda t, raw: _mapping(converter, t, raw))
    hook(
        lambda t: isinstance(t, type) and t is not Curve and attrs.has(t),
        lambda t, raw: _class(converter, t, raw),
    )
    hook(
        lambda t: isinstance(t, type) and t in slots,
        lambda t, raw: _class(converter, _component(registry, slots[t], raw), raw),
    )
    return converter


def _int(raw: object) -> int:
    if isinstance(raw, float) and raw.is_integer() and abs(raw) < 2**63:
        return int(raw)
    return _exactly(raw, int, "an integer")


def _float(raw: object) -> float:
    number = float(raw) if isinstance(raw, int) and not isinstance(raw, bool) else raw
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"must be finite, got {number}")
    return _exactly(number, float, "a number")


def _exactly(raw: object, cls: type[_T], wanted: str) -> _T:
    if type(raw) is not cls:
        raise ValueError(f"expected {wanted}, got {describe(raw)}")
    return raw


def _literal(wanted: Any, raw: object) -> object:
    options = get_args(wanted)
    for option in options:
        if type(option) is type(raw) and option == raw:
            return option
    hint = suggest(raw, [str(option) for option in options]) if isinstance(raw, str) else ""
    raise ValueError(f"must be one of {', '.join(map(repr, options))}, got {describe(raw)}{hint}")


def _sequence(converter: cattrs.Converter, wanted: Any, raw: object) -> object:
    items, types = _exactly(raw, list, "a list"), get_args(wanted)
    if get_origin(wanted) is not tuple or types[-1] is Ellipsis:
        types = types[:1] * len(items)
    elif len(items) != len(types):
        raise ValueError(f"expected a list of {len(types)}, got one of {len(items)}")
    parts = [(i, item, kind) for i, (item, kind) in enumerate(zip(items, types, strict=True))]
    values, errors = _gather(converter, parts)
    if errors:
        raise _group(errors, wanted)
    return tuple(values.values()) if get_origin(wanted) is tuple else list(values.values())


def _mapping(converter: cattrs.Converter, wanted: Any, raw: object) -> object:
    _, kind = get_args(wanted)
    entries = _exactly(raw, dict, "a map").items()
    parts = [(key, item, kind) for key, item in entries if item is not None or _may_be_none(kind)]
    values, errors = _gather(converter, parts)
    if errors:
        raise _group(errors, wanted)
    return values


def _component(registry: Registry, slot: str, raw: object) -> type:
    """Return the config class that `use` names."""
    uses = registry.uses(slot)
    if not isinstance(raw, dict) or raw.get("use") is None:
        got = "`use` is missing" if isinstance(raw, dict) else f"got {describe(raw)}"
        raise ValueError(f"expected a map such as {{use: {uses[0] if uses else slot}}}; {got}{_known(uses)}")
    use = raw["use"]
    entry = registry.get(slot, use) if isinstance(use, str) else None
    if entry is None:
        hint = suggest(str(use), uses)
        text = f"there is no {slot} {describe(use)}{hint}{'' if 'known' in hint else _known(uses)}"
        raise _group([_at("use", _NoComponentError(text))], dict)
    return entry.config


def _known(uses: Sequence[str]) -> str:
    return f" (known: {', '.join(uses)})" if uses else ""


def _class(converter: cattrs.Converter, cls: type, raw: object) -> object:
    """Structure the fields of an attrs class and build it, or tell of every key and field that is wrong."""
    given = _exactly(raw, dict, "a map")
    fields = {field.alias: field for field in attrs.fields(attrs.resolve_types(cls)) if field.init}
    mark = mark_of(cls)
    parts: list[_Part] = []
    errors: list[Exception] = []
    for key in given:
        if key not in fields and not (mark and key == "use" and given[key] == mark.use):
            errors.append(_at(key, ValueError(f"unknown key{suggest(key, fields)}")))
    for key, field in fields.items():
        if given.get(key) is not None or (key in given and _may_be_none(field.type)):
            parts.append((key, given[key], field.type))
        elif field.default is attrs.NOTHING:
            text = "is null and has no default" if key in given else "is missing"
            errors.append(_at(key, ValueError(text)))
    values, wrong = _gather(converter, parts)
    errors += wrong
    if not errors:
        try:
            return cls(**{str(key): value for key, value in values.items()})
        except Exception as error:
            errors = _refused(cls, values) or [error]
    else:
        errors += _refused(cls, values)
    raise _group(errors, cls)


def _refused(cls: type, values: Mapping[str | int, object]) -> list[Exception]:
    """Return what each validator says: `__init__` stops at the first that refuses."""
    blank: object = object.__new__(cls)
    errors: list[Exception] = []
    for field in attrs.fields(cls):
        if field.validator is not None and field.alias in values:
            try:
                field.validator(blank, field, values[field.alias])
            except Exception as error:
                errors.append(_at(field.alias, error))
    return errors


def _gather(converter: cattrs.Converter, parts: Iterable[_Part]) -> tuple[dict[str | int, object], list[Exception]]:
    """Return the parts that could be structured, and the errors of the others."""
    values: dict[str | int, object] = {}
    errors: list[Exception] = []
    for step, raw, kind in parts:
        try:
            values[step] = converter.structure(raw, kind)
        except Exception as error:
            errors.append(_at(step, error))
    return values, errors


def _group(errors: Sequence[Exception], cls: Any) -> IterableValidationError:
    return IterableValidationError(f"structuring {cls}", errors, cls)


def _may_be_none(kind: Any) -> bool:
    return type(None) in get_args(kind)


# --- telling ----------------------------------------------------------------------------------------------


def _at(step: str | int, error: Exception) -> Exception:
    """Note on `error` the step that leads to it."""
    error.add_note(IterableValidationNote(f"at {step}", step, None))
    return error


def _leaves(error: BaseException, path: _Path) -> Iterator[tuple[_Path, BaseException]]:
    """Yield every single error with the path to it."""
    path += tuple(note.index for note in getattr(error, "__notes__", ()) if isinstance(note, IterableValidationNote))
    if isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            yield from _leaves(inner, path)
    elif isinstance(error, CurveError):
        yield from (((*path, *steps), ValueError(text)) for steps, text in error.problems)
    else:
        yield path, error


def _problems(tree: Node, leaves: Iterable[tuple[_Path, BaseException]]) -> list[Problem]:
    """Place errors, in the order of the file; what one written value does in several blocks is told once."""
    problems: dict[object, Problem] = {}
    for path, error in leaves:
        node, depth = tree, 0
        while depth < len(path) and (below := node.child(path[depth])) is not None:
            node, depth = below, depth + 1
        text = _render(error)
        problem = Problem(node.origin, ".".join(map(str, path)), text)
        problems.setdefault((id(node), path[depth:], text), problem)
    return sorted(problems.values(), key=lambda p: (p.origin.file, p.origin.line or 0) if p.origin else ("", 0))


def _render(error: BaseException) -> str:
    """Return what `error` says to a person."""
    if isinstance(error, StructureHandlerNotFoundError):
        return f"presets cannot hold a {error.type_}; the component must declare another type"
    text = str(error.args[0]) if error.args else ""
    for pattern, template in _RENDERED:
        if match := pattern.fullmatch(text):
            return match.expand(template)
    expected = isinstance(error, ValueError) and text
    return text if expected else f"{type(error).__name__}: {text}"


# --- writing ----------------------------------------------------------------------------------------------


def _unstructurer() -> cattrs.Converter:
    converter = cattrs.Converter()

    def fields(config: Any) -> dict[str, object]:
        mark = mark_of(type(config))
        named = {} if mark is None else {"use": mark.use}
        return named | {
            field.alias: converter.unstructure(getattr(config, field.name))
            for field in attrs.fields(type(config))
            if field.init
        }

    converter.register_unstructure_hook_func(attrs.has, fields)
    converter.register_unstructure_hook(Curve, Curve.dump)
    converter.register_unstructure_hook(tuple, lambda items: [converter.unstructure(item) for item in items])
    return converter


_UNSTRUCTURE = _unstructurer()

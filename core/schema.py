"""What configs say of themselves: a summary, a line for each field, and the paper that they follow."""

import inspect
import re
import sys
import types
from collections.abc import Mapping
from typing import Literal, Union, get_args, get_origin, get_type_hints

import attrs
from attrs import frozen
from docstring_parser import parse

from tangram.core.contracts import SLOTS
from tangram.core.curve import Curve


@frozen
class Field:
    """One key of a config.

    Attributes:
        name: The key.
        type: What it takes, in words.
        default: The default as a preset writes it; `required` if there is none.
        doc: What it means.
    """

    name: str
    type: str
    default: str
    doc: str


def summary(config: type) -> str:
    """Return the first line of a config class's docstring."""
    return parse(inspect.getdoc(config) or "").short_description or ""


_PAPER = re.compile(r"arXiv:\d{4}\.\d{5}(?:, (?:sections?|equations?|eq\.|appendix) [^);]*)?")


def paper(config: type) -> str:
    """Return the paper and section that a component cites first: its own docstring, or else its module's; or ""."""
    for text in (inspect.getdoc(config), inspect.getdoc(sys.modules[config.__module__])):
        if found := _PAPER.search(" ".join((text or "").split())):
            return found.group().rstrip(".,:")
    return ""


def fields(config: type) -> list[Field]:
    """Return the keys of a config class in order."""
    documented = {param.arg_name: param.description or "" for param in parse(inspect.getdoc(config) or "").params}
    hints = get_type_hints(config)
    return [
        Field(
            name=attribute.name,
            type=_type(hints[attribute.name]),
            default=_default(attribute.default),
            doc=" ".join(documented.get(attribute.name, "").split()),
        )
        for attribute in attrs.fields(config)
    ]


def _type(hint: object) -> str:
    slots = {protocol: slot for slot, protocol in SLOTS.items()}
    origin = get_origin(hint)
    if origin is Literal:
        return " | ".join(map(str, get_args(hint)))
    if origin in (Union, types.UnionType):
        return " | ".join(_type(part) for part in get_args(hint))
    if origin is tuple:
        return f"list of {_type(get_args(hint)[0])}"
    if origin is Mapping:
        return f"map of {_type(get_args(hint)[1])}"
    if hint is type(None):
        return "null"
    if hint is Curve:
        return "number or curve"
    if isinstance(hint, type):
        return slots.get(hint, "map" if attrs.has(hint) else hint.__name__)
    return str(hint)


def _default(value: object) -> str:
    if value is attrs.NOTHING:
        return "required"
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        return "built"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Curve):
        return str(value.dump())
    if isinstance(value, tuple):
        return str(list(value))
    return str(value) or '""'

"""The JSON schema of presets (draft 2020-12), for editors; made from the registry and the configs themselves.

A preset may be a patch on another, so no key is demanded and null stands everywhere. What a schema cannot say is left
to `core/structuring.py`, which is the truth; all that it accepts is valid here.
"""

import operator
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

import attrs
from attrs import frozen
from cattrs.cols import is_mapping

from tangram.core.contracts import SLOTS
from tangram.core.curve import Curve
from tangram.core.experiment import Experiment
from tangram.core.registry import Entry, Registry
from tangram.core.schema import fields, summary
from tangram.core.structuring import plain

Schema: TypeAlias = dict[str, object]

_NULL: Schema = {"type": "null"}
_SIMPLE: Mapping[object, str] = {int: "integer", float: "number", str: "string", bool: "boolean"}
_BOUNDS = {
    operator.gt: "exclusiveMinimum",
    operator.ge: "minimum",
    operator.lt: "exclusiveMaximum",
    operator.le: "maximum",
}
_COLLECTIONS = ("objective", "observer")
"""Slots that are maps, in which `use` is the key where it is not said."""

_NUMBER: Schema = {"type": "number"}
_END: Schema = {"type": "integer", "exclusiveMinimum": 0}
_ENDS: Schema = {"until": _END, "until_step": _END}
_CURVE: Schema = {
    "description": "A number, or pieces in order; all but the last end `until` so many tokens or `until_step`.",
    "anyOf": [
        _NUMBER,
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {**_ENDS, "value": _NUMBER},
                        "required": ["value"],
                        "not": {"required": ["until", "until_step"]},
                        "additionalProperties": False,
                    },
                    {
                        "type": "object",
                        "properties": {
                            **_ENDS,
                            "from": _NUMBER,
                            "to": _NUMBER,
                            "shape": {"enum": ["linear", "cosine"]},
                        },
                        "required": ["from", "to", "shape"],
                        "oneOf": [{"required": ["until"]}, {"required": ["until_step"]}],
                        "additionalProperties": False,
                    },
                ]
            },
        },
    ],
}


def preset_schema(registry: Registry) -> Schema:
    """Return the schema of a preset file whose components are those of `registry`."""
    made = _Definitions(registry, {"curve": _CURVE})
    names = {"type": "string"}
    root = made.config(Experiment)
    extends = {
        "description": "A preset, or several, that this one is laid over; later ones win.",
        "anyOf": [names, {"type": "array", "items": names}, _NULL],
    }
    properties = root["properties"]
    assert isinstance(properties, dict)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A tangram preset",
        **root,
        "properties": {"extends": extends, **properties},
        "$defs": dict(sorted(made.definitions.items())),
    }


@frozen
class _Definitions:
    """Writes schemas of types, and collects those that have a name.

    Attributes:
        registry: The components.
        definitions: The named schemas so far.
    """

    registry: Registry
    definitions: dict[str, object]

    def config(self, cls: type) -> Schema:
        """Return the schema of a config class."""
        hints = get_type_hints(cls)
        docs = {field.name: field.doc for field in fields(cls)}
        properties: dict[str, object] = {}
        for attribute in attrs.fields(cls):
            if attribute.init:
                schema = _limited(self.of(hints[attribute.name]), attribute.validator)
                properties[attribute.alias] = {
                    "description": docs[attribute.name],
                    **_default(attribute),
                    **_or_null(schema),
                }
        return {
            "description": summary(cls),
            "type": "object",
            "properties": properties,
            "additionalProperties": False,
        }

    def of(self, hint: Any) -> Schema:
        """Return the schema of a type."""
        slots = {contract: slot for slot, contract in SLOTS.items()}
        origin, inner = get_origin(hint), get_args(hint)
        if hint in _SIMPLE:
            return {"type": _SIMPLE[hint]}
        if hint is Curve:
            return {"$ref": "#/$defs/curve"}
        if origin is Literal:
            return {"enum": list(inner)}
        if origin in (Union, types.UnionType):
            (some,) = [part for part in inner if part is not type(None)]
            return self.of(some)
        if origin in (tuple, list, Sequence):
            return self._list(origin, inner)
        if is_mapping(hint):
            slot = slots.get(inner[1])
            return self._collection(slot) if slot in _COLLECTIONS else _map(_or_null(self.of(inner[1])))
        if hint in slots:
            return self._named(slots[hint], lambda: self._slot(slots[hint]))
        return self._named(hint.__name__, lambda: self.config(hint))

    def _list(self, origin: object, inner: tuple[Any, ...]) -> Schema:
        """Return a list, or the patch of one: a map from the index to a patch on the element."""
        if origin is tuple and inner[-1] is not Ellipsis:
            whole: Schema = {
                "prefixItems": [self.of(part) for part in inner],
                "minItems": len(inner),
                "maxItems": len(inner),
            }
        else:
            whole = {"items": self.of(inner[0])}
        items = self.of(inner[0])
        patch: Schema = {"type": "object", "patternProperties": {r"^\d+$": items}, "additionalProperties": False}
        return {"anyOf": [{"type": "array", **whole}, patch]}

    def _named(self, name: str, make: Callable[[], Schema]) -> Schema:
        if name not in self.definitions:
            self.definitions[name] = {}  # a component may nest one of its own slot
            self.definitions[name] = make()
        return {"$ref": f"#/$defs/{name}"}

    def _components(self, slot: str) -> dict[str, Schema]:
        """Return a reference to each component of a slot."""
        entries = [entry for entry in self.registry if entry.mark.slot == slot]
        return {e.mark.use: self._named(f"{slot}.{e.mark.use}", partial(self._component, e)) for e in entries}

    def _component(self, entry: Entry) -> Schema:
        schema = self.config(entry.config)
        properties = schema["properties"]
        assert isinstance(properties, dict)
        return {**schema, "properties": {"use": {"const": entry.mark.use}, **properties}}

    def _slot(self, slot: str) -> Schema:
        """Return a component that `use` names, or a patch that leaves `use` to what it is laid over."""
        components = self._components(slot)
        return _one_of(components, {"anyOf": list(components.values())})

    def _collection(self, slot: str) -> Schema:
        """Return a map of components in which a component's own name needs no `use`."""
        components = self._components(slot)
        general = self._named(slot, lambda: self._slot(slot))
        own = {name: _or_null(_one_of(components, reference)) for name, reference in components.items()}
        return {"type": "object", "properties": own, "additionalProperties": _or_null(general)}


def _one_of(components: Mapping[str, Schema], unnamed: Schema) -> Schema:
    named: list[Schema] = [{**reference, "required": ["use"]} for reference in components.values()]
    return {"oneOf": [*named, {**unnamed, "not": {"required": ["use"]}}]}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _or_null(schema: Schema) -> Schema:
    kind, options = schema.get("type"), schema.get("enum")
    if isinstance(options, list):
        return {**schema, "enum": [*options, None]}
    if isinstance(kind, str):
        return {**schema, "type": [kind, "null"]}
    return {"anyOf": [schema, _NULL]}


def _default(attribute: "attrs.Attribute[Any]") -> Schema:
    if attribute.default is attrs.NOTHING or isinstance(attribute.default, attrs.Factory):  # type: ignore[arg-type]
        return {}
    return {"default": plain(attribute.default)}


# attrs keeps the classes of its validators to itself, so each is that of an example.
_OPTIONAL: Any = type(attrs.validators.optional(attrs.validators.gt(0)))
_AND: Any = type(attrs.validators.and_())
_BOUND: Any = type(attrs.validators.gt(0))
_IN: Any = type(attrs.validators.in_(()))
_MIN_LEN: Any = type(attrs.validators.min_len(1))


def _limited(schema: Schema, validator: Any) -> Schema:
    """Return `schema` within what a validator of attrs demands; one that is not known demands nothing here."""
    if isinstance(validator, _OPTIONAL):
        return _limited(schema, validator.validator)
    if isinstance(validator, _AND):
        for part in validator._validators:
            schema = _limited(schema, part)
    elif isinstance(validator, _BOUND) and "type" in schema:
        return {**schema, _BOUNDS[validator.compare_func]: validator.bound}
    elif isinstance(validator, _IN):
        return {"enum": list(validator.options)}
    elif isinstance(validator, _MIN_LEN) and schema.get("type") == "string":
        return {**schema, "minLength": validator.min_length}
    return schema

"""What was drawn, as one line of YAML that a person can read and paste."""

import io
from collections.abc import Mapping
from enum import Enum

import attrs
from ruamel.yaml import YAML
from torch import Tensor

from tangram.core.registry import mark_of
from tangram.core.structuring import plain


def yaml_line(values: Mapping[str, object]) -> str:
    """Return the values as one flow map: components as in a preset, tensors as lists."""
    yaml = YAML()
    yaml.default_flow_style = True
    yaml.width = 1 << 20
    yaml.representer.ignore_aliases = lambda _: True
    text = io.StringIO()
    yaml.dump(_shown(values), text)
    return text.getvalue().strip()


def _shown(value: object) -> object:
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_shown(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if mark_of(type(value)) is not None:
        return plain(value)
    kind: type = type(value)
    if attrs.has(kind):
        return {field.name: _shown(getattr(value, field.name)) for field in attrs.fields(kind)}
    return str(value)

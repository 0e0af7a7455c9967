"""A forward cut between its phases, so that its backward can stop between them and something else go on."""

from collections.abc import Callable
from typing import TypeVar, cast

import attrs
import torch
from torch import Tensor

from tangram.core.records import Carry

_T = TypeVar("_T")

Link = tuple[Tensor, Tensor]
"""What leaves one phase, and the leaf as which it enters the next: the leaf's gradient goes on from what left."""


def cut(carry: Carry) -> tuple[Carry, list[Link]]:
    """Return the carry as the next phase is to take it, with leaves in place of what has a gradient."""
    links: dict[int, Link] = {}

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in links:  # what is in the carry twice enters once
            links[id(tensor)] = tensor, tensor.detach().requires_grad_()
        return links[id(tensor)][1]

    return mapped(leaf, carry), list(links.values())


def back(links: list[Link]) -> None:
    """Take the gradients of a phase's leaves back through the phase before it."""
    roots = [(left, leaf.grad) for left, leaf in links if leaf.grad is not None]
    if roots:
        torch.autograd.backward([left for left, _ in roots], [grad for _, grad in roots])


def tensors(value: object) -> list[Tensor]:
    """Return every tensor in a carry or another record, those in it twice once."""
    found: dict[int, Tensor] = {}

    def take(tensor: Tensor) -> Tensor:
        return found.setdefault(id(tensor), tensor)

    mapped(take, value)
    return list(found.values())


def mapped(fn: Callable[[Tensor], Tensor], value: _T) -> _T:
    """Return a record with `fn` done to every tensor in it: in records inside it, and in tuples."""
    if isinstance(value, Tensor):
        return cast(_T, fn(value))
    if isinstance(value, tuple):
        parts = [mapped(fn, part) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return cast(_T, type(value)(*parts) if hasattr(value, "_fields") else tuple(parts))
    kind: type = type(value)
    if attrs.has(kind):
        fields = {field.name: getattr(value, field.name) for field in attrs.fields(kind) if field.init}
        changed = {name: new for name, old in fields.items() if (new := mapped(fn, old)) is not old}
        return attrs.evolve(value, **changed) if changed else value  # type: ignore[misc]
    return value

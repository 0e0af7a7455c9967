"""Shardings with one known fault each."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tangram.core.records import GradientNorm


def forgets_a_parameter(sharding: Any) -> Any:
    """One parameter is never stepped."""
    attach = sharding.attach
    sharding.attach = lambda model: attach(model)[:-1]
    return sharding


def attaches_a_parameter_twice(sharding: Any) -> Any:
    """One parameter is stepped twice."""
    attach = sharding.attach

    def attaching(model: Any) -> Any:
        found = attach(model)
        return [*found, found[0]]

    sharding.attach = attaching
    return sharding


def clips_to_twice_the_limit(sharding: Any) -> Any:
    """The gradients are scaled to another norm than was asked for."""
    clip = sharding.clip
    sharding.clip = lambda limit: clip(2 * limit)
    return sharding


def _stepped(sharding: Any) -> list[nn.Parameter]:
    """Return what the optimizer steps: a list that is filled when the model is attached."""
    attach, found = sharding.attach, list[nn.Parameter]()

    def attaching(model: Any) -> Any:
        attached = attach(model)
        found.extend(parameter for _, parameter in attached)
        return attached

    sharding.attach = attaching
    return found


def _grads(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def clips_each_parameter_alone(sharding: Any) -> Any:
    """Each gradient is scaled to the limit by itself, which turns the direction."""
    clip, stepped = sharding.clip, _stepped(sharding)

    def clipping(limit: float) -> GradientNorm:
        norm: GradientNorm = clip(math.inf)
        if not norm.broken:
            for grad in _grads(stepped):
                grad.mul_(min(1.0, limit / max(float(grad.norm()), 1e-30)))
        return norm

    sharding.clip = clipping
    return sharding


def returns_the_norm_of_one(sharding: Any) -> Any:
    """The norm is that of the largest gradient, not of all."""
    clip, stepped = sharding.clip, _stepped(sharding)

    def clipping(limit: float) -> GradientNorm:
        largest = max((float(grad.norm()) for grad in _grads(stepped)), default=0.0)
        return GradientNorm(largest, clip(limit).broken)

    sharding.clip = clipping
    return sharding


def names_nothing(sharding: Any) -> Any:
    """A norm that is not finite comes without the gradients that are to blame."""
    clip = sharding.clip
    sharding.clip = lambda limit: GradientNorm(clip(limit).value)
    return sharding


def scales_what_is_broken(sharding: Any) -> Any:
    """Gradients are scaled though the norm is not finite, so that all of them become nan."""
    clip, stepped = sharding.clip, _stepped(sharding)

    def clipping(limit: float) -> GradientNorm:
        norm: GradientNorm = clip(limit)
        if norm.broken:
            for grad in _grads(stepped):
                grad.mul_(limit / norm.value)
        return norm

    sharding.clip = clipping
    return sharding


def halves_the_sum(sharding: Any) -> Any:
    """The sum over the ranks is divided by their number, and losses are over the global count already."""
    reduce, stepped = sharding.reduce, _stepped(sharding)

    def reducing() -> None:
        reduce()
        for grad in _grads(stepped):
            grad.mul_(0.5)

    sharding.reduce = reducing
    return sharding


def loses_the_step(sharding: Any) -> Any:
    """After the step every parameter has again the value that it had at first."""
    reduce, stepped, first = sharding.reduce, _stepped(sharding), list[torch.Tensor]()

    def reducing() -> None:
        reduce()
        first.extend(parameter.detach().clone() for parameter in stepped[len(first) :])

    def gathering() -> None:
        with torch.no_grad():
            for parameter, value in zip(stepped, first, strict=True):
                parameter.copy_(value)

    sharding.reduce, sharding.gather = reducing, gathering
    return sharding


def doubles_the_gradients(sharding: Any) -> Any:
    """Gradients are summed over the ranks twice."""
    reduce = sharding.reduce

    def reducing() -> None:
        reduce()
        reduce()

    sharding.reduce = reducing
    return sharding


def returns_one_at_least(sharding: Any) -> Any:
    """The norm of no gradient at all is not zero."""
    clip = sharding.clip
    sharding.clip = lambda limit: GradientNorm(max(1e-6, clip(limit).value), clip(limit).broken)
    return sharding

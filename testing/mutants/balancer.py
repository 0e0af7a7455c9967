"""Balancers with one known fault each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tangram.core.contracts import Balancer
from tangram.core.records import Progress


def _biases(balancer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the balancer with a change to the biases that it tells."""
    bias = balancer.bias
    balancer.bias = lambda: change(bias())
    return balancer


def _loads(balancer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the balancer with a change to the loads that it is told."""
    update = balancer.update
    balancer.update = lambda load, now: update(change(load), now)
    return balancer


def never_updates(balancer: Balancer) -> Any:
    """The bias is never updated."""
    balancer.update = lambda load, now: None  # type: ignore[method-assign]
    return balancer


def raises_the_overloaded(balancer: Balancer) -> Any:
    """An expert with too many tokens is given more."""
    return _biases(balancer, lambda bias: -bias)


def moves_under_an_equal_load(balancer: Balancer) -> Any:
    """The first expert is taken for one with a token more than it has."""
    return _loads(balancer, lambda load: load + (torch.arange(len(load)) == 0))


def moves_when_it_is_read(balancer: Balancer) -> Any:
    """Whoever asks for the bias moves it."""
    reads: list[None] = []

    def change(bias: Tensor) -> Tensor:
        reads.append(None)
        return bias + 1e-3 * len(reads)

    return _biases(balancer, change)


def follows_the_model_down(balancer: Balancer) -> Any:
    """The biases are kept in bfloat16, in which a step of 0.001 is soon rounded away."""
    return _biases(balancer, lambda bias: bias.bfloat16())


def starts_anew_after_a_checkpoint(balancer: Balancer) -> Any:
    """The biases are not in the state dict."""
    held: list[Tensor] = []
    update, bias = balancer.update, balancer.bias

    def updating(load: Tensor, now: Progress) -> None:
        update(load, now)
        held.append(bias().clone())

    balancer.update = updating  # type: ignore[method-assign]
    balancer.bias = lambda: held[-1] if held else torch.zeros_like(bias())  # type: ignore[method-assign]
    return balancer


def forgets_the_last_expert(balancer: Balancer) -> Any:
    """The last expert's bias stays where it is."""
    return _biases(balancer, lambda bias: bias * (torch.arange(len(bias)) < len(bias) - 1))


def counts_in_float32(balancer: Balancer) -> Any:
    """Loads are summed in float32, which tells no 16,777,217 from 16,777,216."""
    return _loads(balancer, lambda load: load.float().long())

"""Optimizers with one known fault each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _around(optimizer: Any, step: Callable[[Callable[[], Any]], Any]) -> Any:
    """Return the optimizer with a step that is given the real one."""
    real = optimizer.step
    optimizer.step = lambda: step(real)
    return optimizer


def forgets_its_moments(optimizer: Any) -> Any:
    """What it remembers is not where a checkpoint looks, so that it is lost on resume."""
    hidden: dict[Tensor, Any] = {}

    def hiding(step: Callable[[], Any]) -> None:
        optimizer.state.update(hidden)
        step()
        hidden.update(optimizer.state)
        optimizer.state.clear()

    return _around(optimizer, hiding)


def ignores_the_learning_rate(optimizer: Any) -> Any:
    """It steps at a learning rate of its own."""

    def ignoring(step: Callable[[], Any]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        step()

    return _around(optimizer, ignoring)


def decays_without_a_gradient(optimizer: Any) -> Any:
    """A weight that has no gradient decays all the same."""

    def decaying(step: Callable[[], Any]) -> None:
        step()
        with torch.no_grad():
            for parameter in _parameters(optimizer):
                if parameter.grad is None:
                    parameter.mul_(1 - optimizer.param_groups[0]["lr"])

    return _around(optimizer, decaying)


def climbs(optimizer: Any) -> Any:
    """It goes up the gradient."""

    def climbing(step: Callable[[], Any]) -> None:
        for parameter in _parameters(optimizer):
            if parameter.grad is not None:
                parameter.grad.neg_()
        step()

    return _around(optimizer, climbing)


def halves_the_first(optimizer: Any) -> Any:
    """The first parameter of the list moves half as far, so that the order of the list matters."""

    def halving(step: Callable[[], Any]) -> None:
        first = _parameters(optimizer)[0]
        before = first.detach().clone()
        step()
        with torch.no_grad():
            first.lerp_(before, 0.5)

    return _around(optimizer, halving)


def leaves_one_behind(optimizer: Any) -> Any:
    """One parameter is never stepped."""

    def leaving(step: Callable[[], Any]) -> None:
        last = _parameters(optimizer)[-1]
        before = last.detach().clone()
        step()
        with torch.no_grad():
            last.copy_(before)

    return _around(optimizer, leaving)

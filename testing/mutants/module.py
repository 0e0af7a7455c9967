"""Faults that any component inside the model can have. Each takes a module, breaks it, and returns it."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from tangram.core.autograd import Recompute


def allocates_at_once(module: nn.Module) -> nn.Module:
    """A buffer is made on a device of its own."""
    module.register_buffer("table", torch.zeros(2, device="cpu"), persistent=False)
    return module


def forgets_a_tensor_in_reset(module: nn.Module) -> nn.Module:
    """`reset_parameters` leaves one tensor as it was."""
    for part in module.modules():
        if [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            object.__setattr__(part, "reset_parameters", lambda: None)
            break
    return module


def keeps_a_tensor_to_itself(module: nn.Module) -> nn.Module:
    """A tensor that no two of them have in common is not in the state dict."""
    module.register_buffer("own", torch.tensor(int.from_bytes(os.urandom(4))), persistent=False)
    return module


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield every tensor of a module with the part that owns it and its name there."""
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            yield part, name, tensor


def draws_from_elsewhere(module: nn.Module) -> nn.Module:
    """Its initial weights come from the operating system."""
    _, _, tensor = next(_owned(module))
    if not tensor.is_meta:
        with torch.no_grad():
            tensor.fill_(int.from_bytes(os.urandom(4)) / 2**32)
    return module


def loses_a_gradient(module: nn.Module) -> nn.Module:
    """The gradient of one parameter is zero."""
    return _scaled(module, 0.0)


def doubles_a_gradient(module: nn.Module) -> nn.Module:
    """The gradient of one parameter is twice what it should be, as under expert parallelism elsewhere."""
    return _scaled(module, 2.0)


class _ScaledGradient(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach() + self.factor * (weight - weight.detach())


def _scaled(module: nn.Module, factor: float) -> nn.Module:
    """Multiply the gradient of one parameter."""
    part, name, _ = next(_owned(module))
    return register_parametrization(part, name, _ScaledGradient(factor)) and module


def remembers_what_passed(module: nn.Module) -> nn.Module:
    """Its forward stores what it saw."""
    forward = module.forward

    def remembering(*args: Any, **kwargs: Any) -> Any:
        object.__setattr__(module, "seen", args)
        return forward(*args, **kwargs)

    return with_forward(module, remembering)


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return the module with another forward."""
    module.forward = forward
    return module


def passes_otherwise_a_second_time(module: nn.Module) -> nn.Module:
    """Run again, it makes something else of the same input."""
    forward, runs = module.forward, list[None]()

    def run(x: Tensor, *others: Any, **kwargs: Any) -> Any:
        runs.append(None)
        return forward(x * (1.0 if len(runs) == 1 else 1.5), *others, **kwargs)

    return with_forward(module, run)


def widens_its_output(module: nn.Module) -> nn.Module:
    """Its output has another dtype than its input."""
    forward = module.forward

    def widening(*args: Any, **kwargs: Any) -> Any:
        return _widened(forward(*args, **kwargs))

    return with_forward(module, widening)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float32 if value.dtype is torch.float64 else torch.float64)
    return type(value)(*map(_widened, value)) if isinstance(value, tuple) else value


def recomputes_otherwise(module: nn.Module) -> nn.Module:
    """What it computes again in backward is not what it computed."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Recompute):
                setattr(part, name, _otherwise(value))
    return module


def _otherwise(recompute: Recompute) -> Callable[..., Tensor]:
    def run(fn: Callable[..., Tensor], *args: object) -> Tensor:
        runs: list[None] = []

        def impure(*again: object) -> Tensor:
            runs.append(None)
            return fn(*again).mul(1.0 if len(runs) == 1 else 1.5)

        return recompute(impure, *args)

    return run

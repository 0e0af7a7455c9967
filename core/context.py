"""All that a component knows of its surroundings."""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from attrs import evolve, field, frozen
from torch import nn

from tangram.core.autograd import Recompute, WeightGrads
from tangram.core.contracts import Input, Precision
from tangram.core.groups import Groups
from tangram.core.layers import FullPrecision
from tangram.core.layout import Layout

_P = ParamSpec("_P")
_T = TypeVar("_T")


_TOO_LARGE = ("overflow", "allocate", "out of memory")
"""How torch says that a tensor cannot be: it has no error of its own for that."""


class BuildError(Exception):
    """A component cannot be built in these surroundings; the message begins with its dotted path."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self.message = path, message

    def __reduce__(self) -> tuple[type["BuildError"], tuple[str, str]]:
        """Let another rank have it."""
        return BuildError, (self.path, self.message)


@frozen(eq=False)
class Parallel:
    """Where the work runs.

    Attributes:
        weight_grads: The rank's queue of weight gradients.
        layout: The ranks of the run, and which of them this is.
        groups: The groups of processes that this rank talks in.
        device: Where this rank computes.
    """

    weight_grads: WeightGrads = field(factory=WeightGrads)
    layout: Layout = field(factory=Layout)
    groups: Groups = field(factory=Groups)
    device: torch.device = field(default=torch.device("cpu"))


@frozen(eq=False, kw_only=True)
class Context:
    """What a component is built from, besides its own config.

    Attributes:
        dim: Width D of the residual stream.
        layer: Number of the block; n_layers + k for the k-th block of an objective.
        n_layers: Blocks in the trunk.
        init_std: Standard deviation of the normal initial weights.
        norm_eps: Added to the mean square in every RMSNorm.
        precision: Makes the linears whose products may run in low precision.
        recompute: `y = ctx.recompute(fn, *args)` says that y may be computed again in backward.
        parallel: Where the work runs.
    """

    dim: int
    layer: int = 0
    n_layers: int = 1
    init_std: float = 0.006
    norm_eps: float = 1e-6
    precision: Precision = field(factory=FullPrecision)
    recompute: Recompute = field(factory=Recompute)
    parallel: Parallel = field(factory=Parallel)

    def linear(self, d_in: int, d_out: int, *, input: Input = "plain") -> nn.Module:
        """Return a linear without bias, x [..., d_in] -> [..., d_out], as the precision makes them."""
        return self.precision.linear(self, d_in, d_out, input=input)

    def grouped_linear(self, n: int, d_in: int, d_out: int, *, input: Input = "plain") -> nn.Module:
        """Return `n` linears, (rows [M, d_in], counts [n]) -> [M, d_out], as the precision makes them."""
        return self.precision.grouped_linear(self, n, d_in, d_out, input=input)

    def at(self, layer: int) -> "Context":
        """Return the context of another layer."""
        return evolve(self, layer=layer)

    def child(
        self, name: str, build: Callable[Concatenate["Context", _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Build a component inside a component: `ctx.child("router", config.router.build, n_experts)`.

        Raises:
            BuildError: What `build` found wrong, under the component's dotted path.
        """
        return built(name, build, self, *args, **kwargs)


def built(name: str, build: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call `build` and put `name` before the path of what it finds wrong.

    Raises:
        BuildError: What `build` found wrong.
    """
    try:
        return build(*args, **kwargs)
    except BuildError as error:
        raise BuildError(f"{name}.{error.path}", error.message) from None
    except (ValueError, OverflowError, MemoryError) as error:
        raise BuildError(name, str(error) or "is too large for this machine") from error
    except RuntimeError as error:
        if not any(word in str(error) for word in _TOO_LARGE):
            raise
        raise BuildError(name, "is too large: " + str(error).partition("\n")[0]) from error

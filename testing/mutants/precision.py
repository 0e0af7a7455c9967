"""Precisions with one known fault each."""

from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from tangram.core.autograd import WeightGrads
from tangram.core.context import Context, Parallel
from tangram.core.contracts import Input, Precision
from tangram.testing.mutants.module import with_forward


class _Changed:
    """A precision whose surroundings, or whose linears, are others."""

    def __init__(
        self,
        precision: Precision,
        around: Callable[[Context], Context] = lambda ctx: ctx,
        made: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.precision, self.compute, self.master = precision, precision.compute, precision.master
        self.rounding = precision.rounding
        self._around, self._made = around, made

    def linear(self, ctx: Context, d_in: int, d_out: int, *, input: Input = "plain") -> nn.Module:
        return self._made(self.precision.linear(self._around(ctx), d_in, d_out, input=input))

    def grouped_linear(self, ctx: Context, n: int, d_in: int, d_out: int, *, input: Input = "plain") -> nn.Module:
        return self._made(self.precision.grouped_linear(self._around(ctx), n, d_in, d_out, input=input))


def rounds_twice(precision: Any) -> Any:
    """The input is rounded to eight bits before it is rounded to what is multiplied."""

    def rounding(module: nn.Module) -> nn.Module:
        forward = module.forward

        def rounded(x: Tensor, *counts: Tensor) -> Any:
            scale = x.detach().abs().max().clamp_min(1e-30)
            coarse = (x.detach() / scale).to(torch.float8_e5m2).to(x.dtype) * scale
            return forward(x + (coarse - x.detach()), *counts)

        return with_forward(module, rounded)

    return _Changed(precision, made=rounding)


def divides_by_the_largest(precision: Any) -> Any:
    """The scale of a block of zeros is a division by zero."""

    def scaling(module: nn.Module) -> nn.Module:
        forward = module.forward

        def scaled(x: Tensor, *counts: Tensor) -> Any:
            scale = x.detach().abs().amax(-1, keepdim=True)
            return forward(x / scale, *counts) * scale

        return with_forward(module, scaled)

    return _Changed(precision, made=scaling)


def widens_its_product(precision: Any) -> Any:
    """What comes out of a linear is not of the compute dtype."""

    def widening(module: nn.Module) -> nn.Module:
        forward = module.forward
        other = torch.float32 if precision.compute is torch.float64 else torch.float64
        return with_forward(module, lambda *args: forward(*args).to(other))

    return _Changed(precision, made=widening)


def keeps_parameters_in_half(precision: Any) -> Any:
    """Parameters are not of the master dtype."""
    return _Changed(precision, made=lambda module: module.half())


def gives_an_expert_the_rows_of_the_next(precision: Any) -> Any:
    """The rows of an expert go to the one after it."""

    def shifting(module: nn.Module) -> nn.Module:
        forward = module.forward
        return with_forward(module, lambda x, *counts: forward(x, *(each.roll(1) for each in counts)))

    return _Changed(precision, made=shifting)


def draws_all_experts_from_one_stream(precision: Any) -> Any:
    """How an expert begins depends on how many others there are."""

    def drawing(module: nn.Module) -> nn.Module:
        weight = module.get_parameter("weight")
        if not weight.is_meta:
            weight.data.copy_(torch.randn(*weight.shape[1:], len(weight)).movedim(-1, 0))
        return module

    return _Changed(precision, made=drawing)


def forgets_that_experts_have_an_axis(precision: Any) -> Any:
    """Nothing says that the first dimension counts experts, so that no rank can hold a slice."""

    def forgetting(module: nn.Module) -> nn.Module:
        object.__setattr__(module, "axis", None)
        return module

    return _Changed(precision, made=forgetting)


def leaves_its_weights_as_they_were(precision: Any) -> Any:
    """`reset_parameters` sets nothing, so that a model that was built without memory begins with rubbish."""

    def leaving(module: nn.Module) -> nn.Module:
        object.__setattr__(module, "reset_parameters", lambda: None)
        return module

    return _Changed(precision, made=leaving)


class _Faulty(WeightGrads):
    """Gives a weight gradient as the real queue does, and a fault where it waits."""

    def __init__(self, queue: WeightGrads, times: int) -> None:
        super().__init__()
        self._queue, self._times = queue, times

    def give(self, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
        if self._queue._pending is None:
            return self._queue.give(weight, compute)
        for _ in range(self._times):
            self._queue.give(weight, compute)
        return None


def _queueing(precision: Precision, times: int) -> _Changed:
    def faulty(ctx: Context) -> Context:
        return evolve(ctx, parallel=Parallel(_Faulty(ctx.parallel.weight_grads, times)))

    return _Changed(precision, around=faulty)


def loses_deferred_gradients(precision: Any) -> Any:
    """A weight gradient that should wait is lost."""
    return _queueing(precision, 0)


def doubles_deferred_gradients(precision: Any) -> Any:
    """A weight gradient that waited is added twice."""
    return _queueing(precision, 2)


def does_not_wait(precision: Any) -> Any:
    """Weight gradients are computed at once, though the backward is told to defer them."""
    return _Changed(precision, around=lambda ctx: evolve(ctx, parallel=Parallel()))

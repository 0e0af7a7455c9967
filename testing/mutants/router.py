"""Routers with one known fault each."""

import math
from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tangram.core.contracts import Router
from tangram.core.records import RouterStats, Routing
from tangram.testing.mutants.module import with_forward


def _routing(router: Router, change: Callable[[Routing, Tensor], Routing]) -> Any:
    """Return the router with a change to what it decides."""
    forward = router.forward
    return with_forward(router, lambda x, bias: change(forward(x, bias), bias))


def _counting(router: Router, change: Callable[[RouterStats], RouterStats]) -> Any:
    """Return the router with a change to its statistics."""
    return _routing(router, lambda routing, bias: evolve(routing, stats=change(routing.stats)))


class _ZeroForMinusInfinity(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(0.0 if isinstance(arg, float) and arg == -math.inf else arg for arg in args)
        return func(*args, **(kwargs or {}))


def masks_groups_with_zero(router: Router) -> Any:
    """What is excluded scores 0.0 instead of -inf, and wins wherever all scores are negative."""
    forward = router.forward

    def masking(x: Tensor, bias: Tensor) -> Routing:
        with _ZeroForMinusInfinity():
            return forward(x, bias)

    return with_forward(router, masking)


def gates_from_biased_scores(router: Router) -> Any:
    """The gates are the scores that chose, with the bias."""
    return _routing(router, lambda routing, bias: evolve(routing, gates=routing.gates + bias[routing.ids]))


def ignores_the_bias(router: Router) -> Any:
    """The bias moves nothing."""
    forward = router.forward
    return with_forward(router, lambda x, bias: forward(x, torch.zeros_like(bias)))


def chooses_twice(router: Router) -> Any:
    """The last choice of a token is its first one again."""

    def change(routing: Routing, bias: Tensor) -> Routing:
        ids = torch.cat([routing.ids[:, :-1], routing.ids[:, :1]], 1)
        return evolve(routing, ids=ids if ids.shape[1] > 1 else ids + len(bias))

    return _routing(router, change)


def counts_again_when_recomputed(router: Router) -> Any:
    """The load is counted in a forward and kept, and so counted twice where a forward is run again."""
    seen: list[Tensor] = []

    def change(stats: RouterStats) -> RouterStats:
        seen.append(stats.load)
        same = [load for load in seen if load.shape == stats.load.shape]
        return evolve(stats, load=torch.stack(same).sum(0))

    return _counting(router, change)


def counts_over_the_batch(router: Router) -> Any:
    """The load of every sequence is that of all of them."""
    return _counting(router, lambda stats: evolve(stats, load=stats.load.sum(0).expand_as(stats.load)))


def counts_in_floats(router: Router) -> Any:
    """The load is counted in float32, exact to 16,777,216."""
    return _counting(router, lambda stats: evolve(stats, load=stats.load.float()))


def tops_what_was_chosen(router: Router) -> Any:
    """The unbiased count is that of the biased choice."""
    return _counting(router, lambda stats: evolve(stats, top=stats.load))


def sums_affinities(router: Router) -> Any:
    """The affinities are summed over a sequence, not averaged."""
    return _counting(router, lambda stats: evolve(stats, affinity=stats.affinity * stats.ids.shape[1]))


def forgets_to_normalise(router: Router) -> Any:
    """The gates of a token sum to whatever they sum to."""

    def change(routing: Routing, bias: Tensor) -> Routing:
        drift = 1.0 + 0.01 * torch.arange(len(routing.gates))
        return evolve(routing, gates=routing.gates * drift[:, None])

    return _routing(router, change)


def detaches_the_gates(router: Router) -> Any:
    """The gates carry no gradient: the router is detached from the loss."""
    return _routing(router, lambda routing, bias: evolve(routing, gates=routing.gates.detach()))


def detaches_the_affinities(router: Router) -> Any:
    """The mean affinities carry no gradient: the sequence-wise loss moves nothing."""
    return _counting(router, lambda stats: evolve(stats, affinity=stats.affinity.detach()))


def prefers_the_first_expert(router: Router) -> Any:
    """An expert's number counts: the first one is preferred."""
    forward = router.forward
    return with_forward(router, lambda x, bias: forward(x, bias + 0.5 * (torch.arange(len(bias)) == 0)))


def mixes_tokens(router: Router) -> Any:
    """A token is routed by a little of the mean over its sequence."""
    forward = router.forward
    return with_forward(router, lambda x, bias: forward(x + 1e-3 * x.mean(1, keepdim=True), bias))


def rounds_its_gates(router: Router) -> Any:
    """The gates are rounded to the dtype in which the model computes."""
    forward = router.forward

    def rounding(x: Tensor, bias: Tensor) -> Routing:
        routing = forward(x, bias)
        return evolve(routing, gates=routing.gates.to(x.dtype).to(routing.gates.dtype))

    return with_forward(router, rounding)

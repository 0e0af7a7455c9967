"""Feed-forwards with one known fault each."""

from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from tangram.core.contracts import FeedForward
from tangram.core.records import Dispatched, FeedForwardOut, Progress, RouterStats
from tangram.testing.mutants.module import with_forward


def _phase(feedforward: Any, name: str, change: Callable[[Any, Any], Any]) -> Any:
    """Return the feed-forward with a phase whose result is changed, given what went in."""
    phase = getattr(feedforward, name)
    setattr(feedforward, name, lambda given: change(given, phase(given)))
    return feedforward


def has_a_forward_of_its_own(feedforward: FeedForward) -> Any:
    """The forward does a little more than the phases."""
    forward = feedforward.forward
    return with_forward(feedforward, lambda x: forward(x)._replace(hidden=forward(x).hidden * 1.01))


def mixes_tokens(feedforward: FeedForward) -> Any:
    """A token takes a little of the mean over its sequence."""
    route = feedforward.route
    feedforward.route = lambda x: route(x + 1e-3 * x.mean(1, keepdim=True))  # type: ignore[method-assign]
    return feedforward


def counts_again_when_recomputed(feedforward: FeedForward) -> Any:
    """The load is counted in a forward and kept, and so counted twice where a forward is run again."""
    seen: list[Tensor] = []

    def change(d: Dispatched, out: FeedForwardOut) -> FeedForwardOut:
        if out.stats is None:
            return out
        seen.append(out.stats.load)
        return out._replace(stats=evolve(out.stats, load=torch.stack(seen).sum(0)))

    return _phase(feedforward, "combine", change)


def tells_nothing_of_its_router(feedforward: FeedForward) -> Any:
    """The statistics of the router are lost: nothing is balanced."""
    return _phase(feedforward, "combine", lambda d, out: out._replace(stats=None))


def tells_of_a_router_that_is_not_there(feedforward: FeedForward) -> Any:
    """A feed-forward says that it has more experts than its router counts."""

    class Larger(type(feedforward)):  # type: ignore[misc]
        @property
        def n_experts(self) -> int:
            return int(super().n_experts) + 1

    feedforward.__class__ = Larger
    return feedforward


def leaks_between_experts(feedforward: FeedForward) -> Any:
    """An expert sees a little of the rows of the others."""

    def change(given: Dispatched, d: Dispatched) -> Dispatched:
        if d.rows is None:
            return d
        return evolve(d, rows=evolve(d.rows, rows=d.rows.rows + 1e-3 * d.rows.rows.sum(0)))

    return _phase(feedforward, "compute", change)


def numbers_its_experts(feedforward: FeedForward) -> Any:
    """What an expert does depends on its number."""

    def change(given: Dispatched, d: Dispatched) -> Dispatched:
        if d.rows is None:
            return d
        factors = 1 + 0.01 * torch.arange(len(d.rows.counts)).repeat_interleave(d.rows.counts)
        return evolve(d, rows=evolve(d.rows, rows=d.rows.rows * factors[:, None]))

    return _phase(feedforward, "compute", change)


def detaches_the_router(feedforward: FeedForward) -> Any:
    """The gates carry no gradient: the router is detached from the loss."""
    combine = feedforward.combine

    def detaching(d: Dispatched) -> FeedForwardOut:
        if d.routing is None:
            return combine(d)
        return combine(evolve(d, routing=evolve(d.routing, gates=d.routing.gates.detach())))

    feedforward.combine = detaching  # type: ignore[method-assign]
    return feedforward


def detaches_the_affinities(feedforward: FeedForward) -> Any:
    """The mean affinities carry no gradient: the sequence-wise loss moves nothing."""

    def change(d: Dispatched, out: FeedForwardOut) -> FeedForwardOut:
        if out.stats is None:
            return out
        stats: RouterStats = evolve(out.stats, affinity=out.stats.affinity.detach())
        return out._replace(stats=stats)

    return _phase(feedforward, "combine", change)


def skips_experts_without_tokens(feedforward: FeedForward) -> Any:
    """Where an expert has no token, its weights have no gradient: the optimizer forgets to step them."""
    compute, last = feedforward.compute, list(feedforward.parameters())[-1]

    def skipping(d: Dispatched) -> Dispatched:
        last.requires_grad_(d.rows is None or bool((d.rows.counts > 0).all()))
        try:
            return compute(d)
        finally:
            last.requires_grad_(True)

    feedforward.compute = skipping  # type: ignore[method-assign]
    return feedforward


def routes_without_the_bias(feedforward: FeedForward) -> Any:
    """The router is not given the biases of the balancer."""
    route = feedforward.route

    def routing(x: Tensor) -> Dispatched:
        balancer = feedforward.balancer
        if balancer is None:
            return route(x)
        bias = balancer.bias
        balancer.bias = lambda: torch.zeros_like(bias())  # type: ignore[method-assign]
        try:
            return route(x)
        finally:
            balancer.bias = bias  # type: ignore[method-assign]

    feedforward.route = routing  # type: ignore[method-assign]
    return feedforward


def never_rebalances(feedforward: FeedForward) -> Any:
    """The bias is never updated."""
    feedforward.rebalance = lambda load, now: None  # type: ignore[method-assign]
    return feedforward


def rebalances_a_weight(feedforward: FeedForward) -> Any:
    """Rebalancing shrinks a weight."""
    rebalance, first = feedforward.rebalance, next(feedforward.parameters())

    def shrinking(load: Tensor, now: Progress) -> None:
        rebalance(load, now)
        with torch.no_grad():
            first.mul_(0.999)

    feedforward.rebalance = shrinking  # type: ignore[method-assign]
    return feedforward

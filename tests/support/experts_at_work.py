"""A rank of several that share out the experts of a feed-forward: imported by the processes of the tests."""

import os
import warnings
from collections.abc import Mapping, Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor

from tangram.core.context import Context, Parallel
from tangram.core.contracts import DispatcherConfig, Precision, PrecisionConfig
from tangram.core.layout import Layout
from tangram.core.model import initialize
from tangram.core.records import Dispatched
from tangram.kernels import use
from tangram.plugins.moe.balancers import AuxFreeConfig
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.plugins.moe.moe import MoE, MoEConfig
from tangram.plugins.parallel.hierarchical import Hops
from tangram.plugins.precision.full import FullConfig
from tangram.testing.samples import normal

EXPERTS, TOP_K, GROUPS, TOP_GROUPS, LENGTH = 8, 3, 4, 2, 2

FULL = FullConfig(compute="float64")


@frozen(eq=False)
class Case:
    """What the ranks have.

    Attributes:
        sequences: Sequences of each rank.
        skew: How much more the router is told to want each expert than the next one.
        seed: Of tokens and weights.
    """

    sequences: Sequence[int]
    skew: float
    seed: int

    def of(self, parallel: Parallel) -> slice:
        """Return which sequences are a rank's: all of them if it is alone."""
        if parallel.layout.ranks == 1:
            return slice(None)
        ends = sum(self.sequences[: parallel.layout.rank]), sum(self.sequences[: parallel.layout.rank + 1])
        return slice(*ends)


def parallel_of(rank: int, ranks: int) -> Parallel:
    """Return the surroundings of one of the ranks that share out the experts."""
    return Parallel(layout=Layout(data_ranks=ranks, expert_ranks=ranks, rank=rank))


def moe(parallel: Parallel, dispatcher: DispatcherConfig, precision: Precision, case: Case, dim: int) -> MoE:
    """Return a rank's share of the feed-forward, its weights drawn and its router biased."""
    router = GroupLimitedConfig(top_k=TOP_K, n_groups=GROUPS, top_groups=TOP_GROUPS, gate_scale=2.5)
    config = MoEConfig(
        n_experts=EXPERTS, n_shared=1, hidden=dim, router=router, balancer=AuxFreeConfig(), dispatcher=dispatcher
    )
    built = config.build(Context(dim=dim, init_std=0.3, precision=precision, parallel=parallel))
    assert isinstance(built, MoE)
    initialize(built, case.seed)
    built.balancer.bias().copy_(-case.skew * torch.arange(EXPERTS))
    return built


def gradients(parallel: Parallel, dispatcher: DispatcherConfig, case: Case) -> tuple[dict[str, Tensor], Tensor, int]:
    """Return what a rank's tokens become and all gradients, which experts they chose, and copies that left a node."""
    feedforward = moe(parallel, dispatcher, FULL.build(), case, dim := 6)
    mine, total = case.of(parallel), sum(case.sequences)
    x = normal(total, LENGTH, dim, seed=case.seed)[mine].requires_grad_()
    dispatched = feedforward.dispatch(feedforward.route(x))
    hidden, stats = feedforward.combine(feedforward.compute(dispatched))
    hidden.backward(normal(total, LENGTH, dim, seed=case.seed + 1)[mine])
    assert stats is not None
    assert dispatched.rows is not None
    found = {name: parameter.grad for name, parameter in feedforward.named_parameters()}
    found |= {"hidden": hidden.detach(), "x": x.grad}
    handle = dispatched.rows.handle
    crossed = handle.crossed if isinstance(handle, Hops) else 0
    return {name: _given(each) for name, each in found.items()}, stats.ids.flatten(0, 1), crossed


def put_together(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what all ranks have of one feed-forward: tokens and experts one after the other, the rest summed."""
    whole = {}
    for name in found[0]:
        parts = [each[name] for each in found]
        own = name in ("hidden", "x", "gates", "gate_up.weight", "down.weight")
        whole[name] = torch.cat(parts) if own else torch.stack(parts).sum(0)
    return whole


def all_gradients(rank: int, ranks: int, dispatchers: Sequence[DispatcherConfig], cases: Sequence[Case]) -> list:
    """Return the gradients of each case with each dispatcher."""
    parallel = parallel_of(rank, ranks)
    return [[gradients(parallel, dispatcher, case) for dispatcher in dispatchers] for case in cases]


def routed(
    rank: int, ranks: int, dispatchers: Sequence[DispatcherConfig], precisions: Sequence[PrecisionConfig], case: Case
) -> list[dict[str, Tensor]]:
    """Return what becomes of tokens that the same routing sends to experts of wide rows, and its gradients."""
    parallel = parallel_of(rank, ranks)
    if ranks > 1:
        os.environ["CXX"] = "none"  # to compile takes longer than plain torch does, which rounds the same
        warnings.simplefilter("ignore")  # FP8 says so
    return [_routed(parallel, dispatcher, precision, case) for dispatcher in dispatchers for precision in precisions]


def _routed(
    parallel: Parallel, dispatcher: DispatcherConfig, precision: PrecisionConfig, case: Case
) -> dict[str, Tensor]:
    dim, mine = 144, case.of(parallel)
    feedforward = moe(parallel, dispatcher, precision.build(), case, dim)
    feedforward.shared = None  # it would only add up in another order
    alone = moe(parallel_of(0, 1), dispatcher, FULL.build(), case, dim)
    x, direction = (normal(sum(case.sequences), LENGTH, dim, seed=case.seed + i, dtype=torch.float32) for i in (0, 1))
    routing = alone.router(x.double(), alone.balancer.bias())
    ids, gates = (each.unflatten(0, (-1, LENGTH))[mine].flatten(0, 1) for each in (routing.ids, routing.gates.float()))
    gates, x = gates.detach().requires_grad_(), x[mine].requires_grad_()
    routed = evolve(routing, ids=ids, gates=gates)
    with use("reference"):
        sent = feedforward.dispatch(Dispatched(hidden=x, routing=routed))
        out = feedforward.combine(feedforward.compute(sent)).hidden
        out.backward(direction[mine])
    experts = {name: _given(feedforward.get_parameter(name).grad) for name in ("gate_up.weight", "down.weight")}
    return {"hidden": out.detach(), "x": _given(x.grad), "gates": _given(gates.grad), **experts}


def _given(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad

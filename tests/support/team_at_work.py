"""Two optimizer steps of the small V3 on any layout: imported by the processes of the tests that run one."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from attrs import evolve, frozen
from tiny import exact
from torch import Tensor, distributed

from tangram.core import executor
from tangram.core.assembly import Seat, assemble, sequences_at
from tangram.core.groups import Groups
from tangram.core.layout import Layout
from tangram.core.model import Model
from tangram.core.step import Trainer
from tangram.plugins.parallel.units import Unit
from tangram.testing import assert_same_gradients

LAYERS = "model.blocks.1.repeat=3"  # four in all
MTP = "objectives.mtp.depth=2"
LENGTH = 16 * 12 * 16
"""Terms of the longest sums."""


@frozen(eq=False)
class Taken:
    """What one step left, of all ranks.

    Attributes:
        losses: The losses by name.
        load: Tokens per expert.
        norm: The gradient norm.
        gradients: Every parameter's, summed over its holders, before clipping.
        biases: The expert biases after the step.
    """

    losses: Mapping[str, float]
    load: Tensor
    norm: float
    gradients: Mapping[str, Tensor]
    biases: Mapping[int, Tensor]


def two_steps(rank: int, ranks: int, overrides: Sequence[str], device: str | torch.device = "cpu") -> list[Taken]:
    """Take two steps; the first rank returns what they left everywhere, on the CPU, the others nothing."""
    run, taken = assemble(exact(LAYERS, MTP, *overrides), Seat(rank, ranks, torch.device(device))), []
    for bias in run.model.biases().values():  # so that the choice is not the unbiased one
        bias.copy_(torch.linspace(-0.1, 0.1, len(bias)))
    for _ in range(2):
        now, layout = run.progress, run.parallel.layout
        batch = run.data.batch(now, sequences_at(run.experiment, now, layout.data_ranks))
        result = run.executor.run(batch, now)
        gradients = _everywhere(run, _owned_gradients(run))
        norm = run.sharding.clip(1.0).value
        for group in run.optimizer.param_groups:
            group["lr"] = 0.01
        run.optimizer.step()
        run.sharding.gather()
        run.model.rebalance(result.load, now)
        run.optimizer.zero_grad(set_to_none=True)
        run.model.zero_grad(set_to_none=True)
        run.progress = now.after(batch)
        found = [(f"{layer}", 0, bias.cpu().clone()) for layer, bias in run.model.biases().items()]
        biases = {int(layer): bias for layer, bias in _everywhere(run, found, joined=False).items()}
        taken.append(Taken(dict(result.losses), result.load.cpu(), norm, gradients, biases))
    return taken if rank == 0 else []


# The second step's weights come from the first one's gradients over their root mean square.
BOUNDS = (1e-13, 1e-10)


def assert_the_steps_of_one(found: Sequence[Taken], one: Sequence[Taken], bounds: Sequence[float] = BOUNDS) -> None:
    for number, (several, expected, bound) in enumerate(zip(found, one, bounds, strict=True)):
        assert several.losses == {name: pytest.approx(value, rel=bound) for name, value in expected.losses.items()}
        assert torch.equal(several.load, expected.load)
        assert math.isclose(several.norm, expected.norm, rel_tol=bound)
        assert several.gradients.keys() == expected.gradients.keys()
        if number == 0:
            assert_same_gradients(several.gradients, expected.gradients, length=LENGTH)
        for address, gradient in expected.gradients.items():
            largest = float(gradient.abs().max())
            error = float((several.gradients[address] - gradient).abs().max())
            assert error <= bound * largest, f"step {number}: the gradient of {address} is off by {error / largest:.2g}"
        assert several.biases.keys() == expected.biases.keys()
        for layer, bias in expected.biases.items():
            assert torch.equal(several.biases[layer], bias), f"step {number}: the biases of layer {layer}"


def _owned_gradients(run: Trainer) -> list[tuple[str, int, Tensor]]:
    """Return the gradients that this rank answers for, with the first row of each part."""
    owned, rows = run.sharding.owned(), run.sharding.rows()
    return [
        (address, rows[address].start if address in rows else 0, p.grad.cpu().clone())
        for address, p in run.model.named_parameters()
        if address in owned and p.grad is not None
    ]


def _everywhere(run: Trainer, here: list[tuple[str, int, Tensor]], joined: bool = True) -> dict[str, Tensor]:
    """Return what all ranks have; shares of experts put together, and of equal things the first."""
    found: dict[str, dict[int, Tensor]] = {}
    for address, start, tensor in run.parallel.groups.gather(here, range(run.parallel.layout.ranks)):
        pieces = found.setdefault(address, {})
        if start in pieces and not joined:
            assert torch.equal(pieces[start], tensor), f"{address} differs among its holders"
        pieces[start] = tensor
    return {address: torch.cat([pieces[at] for at in sorted(pieces)]) for address, pieces in found.items()}


def several(rank: int, ranks: int, cases: Mapping[str, Sequence[str]]) -> dict[str, list[Taken]]:
    """Take two steps of each case on the same processes."""
    return {name: two_steps(rank, ranks, overrides) for name, overrides in cases.items()}


def mutated(rank: int, ranks: int, mutant: str, overrides: Sequence[str]) -> list[Taken]:
    """Take two steps with a fault that shipped elsewhere."""
    MUTANTS[mutant]()
    return two_steps(rank, ranks, overrides)


def _no_root_on_inner_stages() -> None:
    roots = executor._Step._roots

    def last_alone(step, slot, carry):
        inner = slot.stage + 1 < step.plan.stages
        yield from roots(step, slot, evolve(carry, losses=()) if inner else carry)

    executor._Step._roots = last_alone


def _no_sum_over_the_tied_embedding() -> None:
    def untied(model, address):
        stages = stages_of(model, address)
        return frozenset(list(stages & model.held)[:1]) if len(stages) > 1 else stages

    stages_of, keep = Model.stages_of, Model._keep

    def keeping(model, stages):
        keep(model, stages)
        model.held = stages

    Model._keep, Model.stages_of = keeping, untied


def _no_sum_over_replicas() -> None:
    holders = Layout.holders

    def here_alone(layout, stages, expert):
        mine = range(layout.pipeline_rank * layout.data_ranks, (layout.pipeline_rank + 1) * layout.data_ranks)
        return tuple(rank for rank in holders(layout, stages, expert) if rank in mine)

    Layout.holders = here_alone


def _mean_of_the_ranks() -> None:
    sum_row = Groups.sum_row
    Groups.sum_row = lambda groups, rows, ranks: sum_row(groups, rows, ranks) / len(ranks)


def _no_sum_over_the_embedding() -> None:
    reduce, sum_row = Unit.reduce, Groups.sum_row

    def reducing(unit):
        alone = any(weight.address.startswith("embedding") for weight in unit.weights)
        Groups.sum_row = (lambda groups, rows, ranks: rows[ranks.index(distributed.get_rank())]) if alone else sum_row
        reduce(unit)

    Unit.reduce = reducing


def _nothing_comes_late() -> None:
    Unit.late = False


def _what_was_whole_stays() -> None:
    def keeping(unit):
        if unit.owes:
            unit.reduce()

    Unit.let_go = keeping


MUTANTS = {
    "no root on inner stages": _no_root_on_inner_stages,
    "no sum over the tied embedding": _no_sum_over_the_tied_embedding,
    "no sum over replicas": _no_sum_over_replicas,
    "the mean of the ranks": _mean_of_the_ranks,
    "no sum over the embedding": _no_sum_over_the_embedding,
    "nothing comes late": _nothing_comes_late,
    "what was whole stays": _what_was_whole_stays,
}

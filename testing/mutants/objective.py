"""Objectives with one known fault each: token objectives, routing objectives, and faults that both can have."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from tangram.core.contracts import FeedForward, RoutingObjective, Shared, TokenObjective
from tangram.core.records import IGNORE, Batch, Carry, Loss, Phase, Progress, RouterStats


class _Token(TokenObjective):
    """A token objective that is given another batch, or whose carry is changed at its end."""

    def __init__(
        self,
        inner: TokenObjective,
        batch: Callable[[Batch], Batch] = lambda batch: batch,
        end: Callable[[str, Batch, Carry], Carry] = lambda name, batch, carry: carry,
    ) -> None:
        super().__init__()
        self.inner, self.curve, self.change, self.end = inner, inner.curve, batch, end

    def weight(self, now: Progress) -> float:
        return self.inner.weight(now)

    def feedforwards(self) -> Sequence[FeedForward]:
        return self.inner.feedforwards()

    def phases(self, name: str, batch: Batch, shared: Shared) -> list[Phase]:
        last = Phase("end", "compute", lambda carry: self.end(name, batch, carry))
        return [*self.inner.phases(name, self.change(batch), shared), last]

    def forward(self, trunk: Tensor, batch: Batch, shared: Shared) -> Loss:
        carry = Carry(hidden=trunk, trunk=trunk)
        for phase in self.phases("loss", batch, shared):
            carry = phase.fn(carry)
        return dict(carry.losses)["loss"]


class _Routing:
    """A routing objective whose loss is another one's, changed."""

    def __init__(self, inner: RoutingObjective, change: Callable[[Tensor, RouterStats, Batch], Tensor]) -> None:
        self.inner, self.change, self.weight = inner, change, inner.weight

    def __call__(self, stats: RouterStats, batch: Batch) -> Tensor:
        return self.change(self.inner(stats, batch), stats, batch)


def _values(objective: Any, change: Callable[[Tensor, Batch], Tensor]) -> Any:
    """Return the objective, of either kind, with another value."""
    if not isinstance(objective, TokenObjective):
        return _Routing(objective, lambda loss, stats, batch: change(loss, batch))

    def end(name: str, batch: Batch, carry: Carry) -> Carry:
        losses = tuple((n, Loss(change(loss.value, batch)) if n == name else loss) for n, loss in carry.losses)
        return evolve(carry, losses=losses)

    return _Token(objective, end=end)


# --- of either kind ---------------------------------------------------------------------------------------------


def weighs_its_loss(objective: Any) -> Any:
    """The loss is reported times its weight."""
    return _values(objective, lambda loss, batch: loss * objective.weight(Progress()))


def is_never_absent(objective: Any) -> Any:
    """A weight of zero is taken for a small one."""
    weight = objective.weight
    objective.weight = lambda now: max(weight(now), 1e-3)
    return objective


def averages_over_the_micro_batch(objective: Any) -> Any:
    """The loss is a mean over the micro-batch, and so depends on how the batch was cut."""
    return _values(objective, lambda loss, batch: loss * batch.n_sequences / len(batch.tokens))


def rounds_its_loss(objective: Any) -> Any:
    """The loss is rounded to bfloat16."""
    return _values(objective, lambda loss, batch: loss.bfloat16())


def adds_up(objective: Any) -> Any:
    """A call returns the sum over all calls until then."""
    losses: list[Tensor] = []

    def change(loss: Tensor, batch: Batch) -> Tensor:
        losses.append(loss.detach())
        return loss + torch.stack(losses).sum() - losses[-1]

    return _values(objective, change)


# --- on tokens --------------------------------------------------------------------------------------------------


def averages_over_positions(objective: TokenObjective) -> Any:
    """The loss is divided by all positions, padding and masked ones too."""
    return _values(objective, lambda loss, batch: loss * batch.n_targets / batch.tokens.numel())


def _shifted(batch: Batch, by: int) -> Batch:
    assert batch.targets is not None
    targets = batch.targets.roll(by, 1)
    wrapped = slice(None, by) if by > 0 else slice(by, None)
    targets[:, wrapped] = IGNORE
    return evolve(batch, targets=targets)


def targets_off_by_one(objective: TokenObjective) -> Any:
    """Targets stand one place late: the loss asks for a token that the model was shown."""
    return _Token(objective, lambda batch: _shifted(batch, 1))


def targets_one_too_far(objective: TokenObjective) -> Any:
    """Targets stand one place early: the loss asks for a token after the next one."""
    return _Token(objective, lambda batch: _shifted(batch, -1))


def crosses_documents(objective: TokenObjective) -> Any:
    """A row is taken for one document: the first tokens of the next one are predicted from this one."""
    return _Token(objective, lambda batch: evolve(batch, segments=torch.zeros_like(batch.segments)))


def drops_other_losses(objective: TokenObjective) -> Any:
    """Only its own loss is left at the end of its phases."""

    def end(name: str, batch: Batch, carry: Carry) -> Carry:
        return evolve(carry, losses=tuple(item for item in carry.losses if item[0] == name))

    return _Token(objective, end=end)


def leaves_its_experts_unbalanced(objective: TokenObjective) -> Any:
    """Nobody is told of the feed-forwards that it owns: their experts are never balanced."""
    objective.feedforwards = lambda: ()  # type: ignore[method-assign]
    return objective


def keeps_its_load_to_itself(objective: TokenObjective) -> Any:
    """The statistics of its routers are lost: their load counts as zero."""
    return _Token(objective, end=lambda name, batch, carry: evolve(carry, stats=()))


# --- on what the routers did --------------------------------------------------------------------------------------


def has_a_zero_gradient(objective: RoutingObjective) -> Any:
    """The loss is there and its gradient is zero: the affinities were detached."""
    return _Routing(objective, lambda loss, stats, batch: loss.detach() + 0.0 * stats.affinity.sum())


def weighs_the_first_sequence(objective: RoutingObjective) -> Any:
    """The first sequence counts twice."""

    def change(loss: Tensor, stats: RouterStats, batch: Batch) -> Tensor:
        names = ("ids", "load", "top", "affinity")
        first = evolve(stats, **{name: getattr(stats, name)[:1] for name in names})
        return loss + objective(first, batch)

    return _Routing(objective, change)

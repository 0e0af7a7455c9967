"""What every objective owes: sums over global counts, and no token predicted from what it was shown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, get_type_hints

import attrs
import torch
from attrs import evolve
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from tangram.core.context import Context, Parallel
from tangram.core.contracts import FeedForward, TokenObjective
from tangram.core.curve import Curve
from tangram.core.experiment import Experiment
from tangram.core.model import Model
from tangram.core.presets import load_preset
from tangram.core.records import IGNORE, Batch, Carry, Loss, Progress, RouterStats, Routing
from tangram.testing.contracts.module import DifferentiableContract, Passed
from tangram.testing.laws import Contract, Law, Mutated, law, written
from tangram.testing.mutants import objective as mutants
from tangram.testing.routed import routings
from tangram.testing.samples import Trunk, context, documents, filled, normal, packed
from tangram.testing.strategies import batches, seeds
from tangram.testing.tolerance import assert_close, tolerance

_DIM, _VOCABULARY, _EXPERTS = 6, 11, 8

_GROWTH = 64
"""How many times rounding may grow: a norm divides by the size of its input, and latents of 1/64 occur."""

_SMALL = (
    f"model.dim={_DIM}",
    f"model.vocab_size={_VOCABULARY}",
    "model.init_std=0.3",
    "model.recompute=none",
    "model.block.attention={n_heads: 2, q_rank: 5, kv_rank: 6, nope_dim: 3, rope_dim: 4, value_dim: 5}",
    f"model.block.feedforward={{n_experts: {_EXPERTS}, hidden: 3, router: {{top_k: 2, n_groups: 4, top_groups: 2}}}}",
    "model.blocks.0={repeat: 1, feedforward: {hidden: 4}}",
    "model.blocks.1={repeat: 1}",
    "precision.compute=float64",
)


@cache
def _experiment() -> Experiment:
    """Return a small DeepSeek-V3: an objective is built for its blocks."""
    return load_preset("v3-tiny", *_SMALL)


class _LossContract(Contract):
    """What objectives of both kinds owe."""

    slot = "objective"
    optional: ClassVar[Mapping[str, str]] = {
        "micro_batches": "a loss on what the routers did is the same however the batch is cut into micro-batches; "
        "a loss on tokens must be"
    }

    @classmethod
    def parts(cls) -> Mapping[str, st.SearchStrategy[Any]]:
        """Return few further tokens for an objective that has a depth."""
        return {"depth": st.integers(1, 3)} if "depth" in get_type_hints(cls.config_class()) else {}

    @classmethod
    def make(cls, config: Any, ctx: Context | None = None) -> Any:
        """Return what the config builds."""
        return cls.placed(config.build(ctx or context(_DIM, compute=cls.dtype), _experiment().model.block))

    @property
    def _wide(self) -> torch.dtype:
        """Dtype of losses and affinities."""
        return torch.promote_types(self.dtype, torch.float32)

    def packed(self, segments: Sequence[Sequence[int]], seed: int) -> Batch:
        """Return isolated documents that predict nothing across a boundary."""
        return self.placed(packed(segments, _VOCABULARY, seed))

    def some_loss(self, objective: Any, seed: int) -> Tensor:
        """Return the loss of drawn inputs."""
        if isinstance(objective, TokenObjective):
            batch = self.packed([[0, 0, 0, 0, 1, 1]], seed)
            trunk = self.placed(normal(1, 6, _DIM, seed=seed, dtype=self.dtype))
            return filled(objective, seed)(trunk, batch, _borrowed(self.dtype, seed, self.device).shared).value
        ids = self.placed(normal(2, 5, _EXPERTS, seed=seed).topk(2).indices)
        load = torch.nn.functional.one_hot(ids, _EXPERTS).sum((1, 2))
        affinity = self.placed(normal(2, _EXPERTS, seed=seed + 1).softmax(-1).to(self._wide))
        loss: Tensor = objective(RouterStats(ids, load, load, affinity), self.placed(_sequences(2, 5)))
        return loss

    @law(seed=seeds(), kills=[mutants.weighs_its_loss])
    def the_loss_is_unweighted(self, config: Any, seed: int) -> None:
        """The loss does not know its weight, which is the gradient put on it."""
        weights = (None, 0.37) if _can(config) else (None,)
        losses = [self.some_loss(self.make(_weighed(config, weight)), seed) for weight in weights]
        assert all(torch.equal(loss, losses[0]) for loss in losses), "the loss grows with its weight"

    @law(seed=seeds(), kills=[mutants.rounds_its_loss])
    def it_keeps_the_dtype(self, config: Any, seed: int) -> None:
        """A loss is a finite scalar, in float32 at least."""
        loss = self.some_loss(self.make(config), seed)
        assert loss.shape == (), f"its shape is {list(loss.shape)}"
        assert bool(loss.isfinite()), f"it is {float(loss)}"
        assert loss.dtype is self._wide, f"it is {loss.dtype}"

    @law(seed=seeds(), kills=[mutants.adds_up])
    def it_remembers_nothing(self, config: Any, seed: int) -> None:
        """The same inputs have the same loss, however often it was asked."""
        objective = self.make(config)
        losses = [self.some_loss(objective, number) for number in (seed, seed + 1, seed)]
        assert torch.equal(losses[0], losses[2]), "a second call says otherwise"

    @law(seed=seeds(), kills=[mutants.is_never_absent])
    def a_weight_of_zero_is_absence(self, config: Any, seed: int) -> None:
        """With a weight of zero no phase of a model computes it; with another one its loss is in the carry."""
        if not _can(config):
            return
        batch = self.packed([[0, 0, 0, 0, 1, 1]], seed)
        for weight in (0.0, 0.5):
            objectives = {"other": _experiment().objectives["next_token"], "tried": _weighed(config, weight)}
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                model = self.placed(Model(evolve(_experiment(), objectives=objectives), Parallel()))
                carry = model(batch, Progress())
            there = "tried" in dict(carry.losses)
            assert there is (weight > 0), f"with a weight of {weight} it is {'there' if there else 'not there'}"


class TokenObjectiveContract(_LossContract, DifferentiableContract):
    """The laws of objectives that read the trunk."""

    dim = _DIM
    length = 400

    def borrowed(self, seed: int) -> Trunk:
        """Return what the objective borrows, filled."""
        return _borrowed(self.dtype, seed, self.device)

    def trunk(self, batch: Batch, seed: int) -> Tensor:
        """Return a drawn trunk for a batch, [B, S, D]."""
        return self.placed(normal(*batch.tokens.shape, _DIM, seed=seed, dtype=self.dtype)).requires_grad_()

    def carried(self, module: Any, trunk: Tensor, batch: Batch, borrowed: Trunk, carry: Carry | None = None) -> Carry:
        """Return the carry after the phases, which add the loss `tried`."""
        carry = evolve(carry or Carry(), hidden=trunk, trunk=trunk)
        for phase in module.phases("tried", batch, borrowed.shared):
            carry = phase.fn(carry)
        return carry

    def passed(self, module: Any, seed: int) -> Passed:
        """Put two packed rows through."""
        batch = self.packed([[0, 0, 0, 1, 1, 1, 1], [0] * 7], seed)
        trunk = self.trunk(batch, seed)
        borrowed = self.borrowed(seed)
        loss = module(trunk, batch, borrowed.shared).value
        with torch.no_grad():
            stats = self.carried(module, trunk, batch, borrowed).stats
        return Passed({"trunk": trunk}, {"out": loss}, {str(i): each.ids.sort(-1).values for i, each in stats})

    @law(seed=seeds(), kills=[mutants.drops_other_losses])
    def its_phases_add_its_loss(self, config: Any, seed: int) -> None:
        """The phases add the loss of the forward under the name they were given, and leave the others."""
        module, batch = self.built(config, seed), self.packed([[0, 0, 0, 1, 1, 1]], seed)
        trunk, borrowed = self.trunk(batch, seed), self.borrowed(seed)
        before = Carry(losses=(("other", Loss(self.placed(torch.ones(())))),))
        losses = dict(self.carried(module, trunk, batch, borrowed, before).losses)
        assert list(losses) == ["other", "tried"], f"the losses are {', '.join(losses)}"
        assert torch.equal(losses["tried"].value, module(trunk, batch, borrowed.shared).value), "it is another loss"

    @law(
        batch=batches(_VOCABULARY, sequences=st.integers(2, 3)),
        seed=seeds(),
        kills=[mutants.averages_over_the_micro_batch],
    )
    def micro_batches_change_nothing(self, config: Any, batch: Batch, seed: int) -> None:
        """The losses of the micro-batches sum to the loss of the batch, and so do their gradients."""
        count = len(batch.tokens)

        def cut(loss: Callable[[Tensor, Batch], Tensor], trunk: Tensor) -> Tensor:
            return torch.stack([loss(trunk[i : i + 1], batch.micro(i, count)) for i in range(count)]).sum()

        self._assert_same(config, batch, cut, seed)

    @law(
        batch=batches(_VOCABULARY, sequences=2),
        more=st.integers(1, 4),
        own=st.booleans(),
        seed=seeds(),
        kills=[mutants.averages_over_positions],
    )
    def appended_padding_changes_nothing(self, config: Any, batch: Batch, more: int, own: bool, seed: int) -> None:
        """Padding, at the end of the last document or as one of its own, changes neither loss nor gradients."""
        assert batch.targets is not None
        last = batch.segments[:, -1:] + int(own)
        padded = evolve(
            batch,
            tokens=pad(batch.tokens, (0, more), value=3),
            targets=pad(batch.targets, (0, more), value=IGNORE),
            positions=pad(batch.positions, (0, more)),
            segments=torch.cat([batch.segments, last.expand(-1, more)], 1),
        )
        tail = self.placed(normal(2, more, _DIM, seed=seed + 1, dtype=self.dtype))
        self._assert_same(config, batch, lambda loss, trunk: loss(torch.cat([trunk, tail], 1), padded), seed)

    @law(
        batch=batches(_VOCABULARY, sequences=1, length=st.integers(4, 7), isolated=True),
        seed=seeds(),
        kills=[mutants.crosses_documents],
    )
    def a_packed_row_costs_what_its_documents_cost(self, config: Any, batch: Batch, seed: int) -> None:
        """A packed row has the loss and gradients of its documents, each in a row of its own."""

        def apart(loss: Callable[[Tensor, Batch], Tensor], trunk: Tensor) -> Tensor:
            losses = []
            for number in batch.segments.unique():
                where = batch.segments == number
                names = ("tokens", "targets", "positions", "segments")
                document = evolve(batch, **{name: getattr(batch, name)[where][None] for name in names})
                losses.append(loss(trunk[where][None], document))
            return torch.stack(losses).sum()

        self._assert_same(config, batch, apart, seed)

    @law(at=st.integers(3, 6), seed=seeds(), kills=[mutants.targets_off_by_one, mutants.targets_one_too_far])
    def a_target_is_predicted_from_what_precedes_it(self, config: Any, at: int, seed: int) -> None:
        """The loss of one target depends on the token before it, and on nothing after that: it was not shown."""
        module, borrowed = self.built(config, seed), self.borrowed(seed)
        batch = self.packed([[0] * 7], seed)
        assert batch.targets is not None
        place = self.placed(torch.arange(7))[None]
        alone = torch.where(place == at, batch.targets, IGNORE)
        batch = evolve(batch, targets=alone, n_targets=1)
        trunk = self.trunk(batch, seed)

        def loss(tokens: Tensor, targets: Tensor) -> Tensor:
            value: Tensor = module(trunk, evolve(batch, tokens=tokens, targets=targets), borrowed.shared).value
            return value

        def other(ids: Tensor, where: Tensor) -> Tensor:
            return torch.where(where, (ids + 1) % _VOCABULARY, ids)

        value = loss(batch.tokens, alone)
        (grad,) = torch.autograd.grad(value, trunk)
        assert not bool(grad[:, at + 1 :].any()), "it depends on the trunk where the target is known"
        later, last = (loss(other(batch.tokens, where), alone) for where in (place > at, place == at))
        # Other tokens may share an expert with these, in whose product they move the rounding.
        bound = tolerance(self.dtype, self.length * _GROWTH**2)
        if bound > 0.1:  # so coarse a dtype cannot tell
            return

        def moved(by: Tensor) -> bool:
            return float((by - value).detach().abs()) > bound * float(value.detach())

        assert not moved(later), "it depends on tokens from the target on"
        assert bool(grad[:, at].any()) or moved(last), "it does not see the token before the target"
        assert moved(loss(batch.tokens, other(alone, place == at))), "it does not depend on the target"

    @law(seed=seeds(), kills=[mutants.leaves_its_experts_unbalanced, mutants.keeps_its_load_to_itself])
    def its_experts_are_balanced_like_the_others(self, config: Any, seed: int) -> None:
        """Every feed-forward with experts that it owns is told, and counts as the next layer after the trunk."""
        module = filled(self.make(config, evolve(self.context(), n_layers=3, layer=3)), seed)
        batch = self.packed([[0] * 6], seed)
        stats = self.carried(module, self.trunk(batch, seed), batch, self.borrowed(seed)).stats
        told = list(module.feedforwards())
        owned = [part for part in module.modules() if isinstance(part, FeedForward) and part.n_experts]
        assert all(any(part is each for each in told) for part in owned), "experts are left unbalanced"
        layers = [3 + k for k, each in enumerate(told) if each.n_experts]
        assert [layer for layer, _ in stats] == layers, f"statistics of other layers than {layers}"
        assert all(bool(counted.load.any()) for _, counted in stats), "a load is empty"

    def _assert_same(
        self,
        config: Any,
        batch: Batch,
        otherwise: Callable[[Callable[[Tensor, Batch], Tensor], Tensor], Tensor],
        seed: int,
    ) -> None:
        """Assert that another way to the loss has the same value and gradients.

        They have one scale, the largest of them: behind a norm hardly more than rounding may be left of a gradient.
        """
        module, borrowed, trunk = self.built(config, seed), self.borrowed(seed), self.trunk(batch, seed)
        wrt = {"trunk": trunk, **borrowed.parameters(), **dict(module.named_parameters())}

        def loss(trunk: Tensor, batch: Batch) -> Tensor:
            value: Tensor = module(trunk, batch, borrowed.shared).value
            return value

        flat = []
        for value in (otherwise(loss, trunk), loss(trunk, batch)):
            grads = torch.autograd.grad(value, list(wrt.values()), allow_unused=True)
            zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(wrt.values(), grads, strict=True)]
            flat.append(torch.cat([value.detach().view(1), *(grad.flatten() for grad in zeros)]))
        assert_close(*flat, length=self.length * _GROWTH**2, dtype=self.dtype, msg="loss and gradients")


class RoutingObjectiveContract(_LossContract):
    """The laws of objectives on what the routers did."""

    @law(
        routing=routings(_EXPERTS, top_k=st.integers(1, 4), length=st.integers(2, 6)),
        kills=[mutants.averages_over_the_micro_batch],
        requires="micro_batches",
    )
    def micro_batches_of_sequences_change_nothing(self, config: Any, routing: Routing) -> None:
        """The losses of micro-batches of one sequence sum to the loss of the batch, and so do their gradients."""
        objective, stats, batch = self._given(config, routing)
        count = len(stats.ids)
        parts = [objective(_rows(stats, slice(i, i + 1)), batch.micro(i, count)) for i in range(count)]
        whole, cut = objective(stats, batch), torch.stack(parts).sum()
        assert_close(cut, whole, length=_EXPERTS * count, msg="loss")
        grads = [torch.autograd.grad(loss, stats.affinity)[0] for loss in (cut, whole)]
        assert_close(*grads, length=_EXPERTS * count, msg="gradient")

    @law(
        routing=routings(_EXPERTS, top_k=st.integers(1, 4), length=st.integers(2, 6)),
        kills=[mutants.has_a_zero_gradient],
    )
    def a_gradient_comes_to_the_affinities(self, config: Any, routing: Routing) -> None:
        """The loss has a gradient through the mean affinities that is not zero: counts have none."""
        objective, stats, batch = self._given(config, routing)
        loss = objective(stats, batch)
        assert loss.requires_grad, "it has no gradient"
        (grad,) = torch.autograd.grad(loss, stats.affinity, allow_unused=True)
        assert grad is not None, "no gradient comes to the affinities"
        assert bool(grad.any()), "the gradient is zero"
        assert bool(grad.isfinite().all()), "the gradient is not finite"

    @law(
        routing=routings(_EXPERTS, top_k=st.integers(1, 4), sequences=st.integers(2, 3), length=st.integers(2, 6)),
        kills=[mutants.weighs_the_first_sequence],
    )
    def the_order_of_sequences_does_not_matter(self, config: Any, routing: Routing) -> None:
        """The same sequences in another order have the same loss."""
        objective, stats, batch = self._given(config, routing)
        reverse = torch.arange(len(stats.ids), device=stats.ids.device).flip(0)
        assert_close(objective(_rows(stats, reverse), batch), objective(stats, batch), length=_EXPERTS * len(reverse))

    def _given(self, config: Any, routing: Routing) -> tuple[Any, RouterStats, Batch]:
        stats = routing.stats
        affinity = stats.affinity.detach().to(self._wide).requires_grad_()
        stats = evolve(stats, affinity=affinity)
        return self.make(config), stats, self.placed(_sequences(*stats.ids.shape[:2]))


class ObjectiveContract(TokenObjectiveContract, RoutingObjectiveContract):
    """The laws of the slot `objective`: those of the kind that the config builds."""

    @classmethod
    def laws(cls) -> Iterator[Law]:
        """Yield the laws of the kind that is built; without a config those of both."""
        theirs = {each.name for each in cls._kind().laws()} if hasattr(cls, "config") else None
        yield from (each for each in super().laws() if theirs is None or each.name in theirs)

    @classmethod
    def _kind(cls) -> type[Contract]:
        config = cls.config
        if isinstance(config, type):
            _experiment()  # what it imports is no part of a strategy
            any_one = settings(database=None, derandomize=True, phases=[Phase.generate])
            config = find(cls.subjects(), lambda _: True, settings=any_one)
        with torch.device("meta"):
            reads_tokens = isinstance(cls.make(config), TokenObjective)
        return TokenObjectiveContract if reads_tokens else RoutingObjectiveContract


def _borrowed(dtype: torch.dtype, seed: int, device: str) -> Trunk:
    with torch.random.fork_rng(devices=[]):  # its initial weights are drawn before they are filled
        return Trunk(context(_DIM, compute=dtype), _VOCABULARY, seed, device)


def _sequences(count: int, length: int) -> Batch:
    """Return a batch of which nothing but its size is read."""
    positions, segments = documents([[0] * length] * count)
    return Batch(positions, positions, positions, segments, count * length, count)


def _rows(stats: RouterStats, rows: slice | Tensor) -> RouterStats:
    return RouterStats(stats.ids[rows], stats.load[rows], stats.top[rows], stats.affinity[rows])


def _can(config: Any) -> bool:
    """Return whether the weight is a field of the config."""
    return "weight" in attrs.fields_dict(type(written(config)))


def _weighed(config: Any, weight: float | None) -> Any:
    """Return the config with another weight, also of a mutant."""
    if weight is None:
        return config
    if isinstance(config, Mutated):
        return Mutated(_weighed(config.config, weight), config.mutant)
    return evolve(config, weight=Curve.constant(weight))

"""What every optimizer owes: it moves its own parameters, at the learning rate it is told, and resumes as it was."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tangram.core import checkpoint
from tangram.core.step import set_lr
from tangram.testing.laws import Contract, law
from tangram.testing.mutants import optimizer as mutants
from tangram.testing.samples import normal
from tangram.testing.strategies import seeds

SHAPES: Mapping[str, tuple[int, ...]] = {
    "embedding.weight": (5, 4),
    "blocks.0.attention.out.weight": (3, 4),
    "blocks.0.feedforward.down.weight": (2, 3, 4),
    "blocks.0.feedforward.router.centroids.weight": (2, 4),
    "norm.weight": (4,),
}
"""Weights of every kind that a model has: rows, a matrix, a stack of experts, centroids and a vector."""

_KEPT = st.sets(st.sampled_from(sorted(SHAPES)), min_size=1)
_LR = 0.01

Named = dict[str, nn.Parameter]


class OptimizerContract(Contract):
    """The laws of the slot `optimizer`."""

    slot = "optimizer"
    optional: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def make(cls, config: Any, parameters: Sequence[tuple[str, nn.Parameter]] | None = None) -> torch.optim.Optimizer:
        """Return what the config builds for these parameters, or for small ones."""
        zeros = {name: nn.Parameter(cls.placed(torch.zeros(shape))) for name, shape in SHAPES.items()}
        optimizer: torch.optim.Optimizer = config.build(parameters or list(zeros.items()))
        return optimizer

    def drawn(self, seed: int) -> Named:
        """Return drawn weights of every kind, in float32 as masters are."""
        shapes = enumerate(SHAPES.items())
        return {
            name: nn.Parameter(self.placed(normal(*shape, seed=seed + i, dtype=torch.float32)))
            for i, (name, shape) in shapes
        }

    def steps(self, optimizer: torch.optim.Optimizer, weights: Named, numbers: Sequence[int], lr: float = _LR) -> None:
        """Take steps along gradients that depend on the number of the step and on the address alone."""
        for number in numbers:
            for name, parameter in weights.items():
                own = 1000 * number + list(SHAPES).index(name)
                parameter.grad = self.placed(normal(*parameter.shape, seed=own, dtype=parameter.dtype))
            set_lr(optimizer, lr)
            optimizer.step()

    @law(before=st.integers(0, 3), after=st.integers(1, 3), seed=seeds(), kills=[mutants.forgets_its_moments])
    def resumed_it_goes_on_bit_for_bit(self, config: Any, before: int, after: int, seed: int) -> None:
        """From a checkpoint of it and the weights, it goes on as one that was never stopped."""
        numbers = range(1, 2 + before + after)
        whole, first, second = (self.drawn(seed) for _ in range(3))
        self.steps(self.make(config, list(whole.items())), whole, numbers)
        stopped = self.make(config, list(first.items()))
        self.steps(stopped, first, numbers[: before + 1])
        resumed = self.make(config, list(second.items()))
        with TemporaryDirectory() as folder:
            state = checkpoint.optimizer_state(stopped, {p: name for name, p in first.items()})
            checkpoint.load_optimizer(checkpoint.save(Path(folder), 1, {"optimizer": state}, {}), resumed, second)
        with torch.no_grad():
            for name, parameter in second.items():
                parameter.copy_(first[name])
        self.steps(resumed, second, numbers[before + 1 :])
        assert not _differing(whole, second), f"resumed, {', '.join(_differing(whole, second))} goes another way"

    @law(kept=_KEPT, seed=seeds(), kills=[mutants.leaves_one_behind, mutants.decays_without_a_gradient])
    def it_moves_what_has_a_gradient_and_nothing_else(self, config: Any, kept: set[str], seed: int) -> None:
        """It steps every parameter that has a gradient, leaves those that have none, and is given which there are."""
        for given in (SHAPES.keys(), kept):
            weights, start = self.drawn(seed), self.drawn(seed)
            optimizer = self.make(config, [(name, weights[name]) for name in SHAPES if name in given])
            self.steps(optimizer, {name: weights[name] for name in kept}, [1])
            moved = set(_differing(start, weights))
            assert moved <= kept, f"{', '.join(sorted(moved - kept))} moves without a gradient"
            assert kept <= moved, f"{', '.join(sorted(kept - moved))} does not move along its gradient"

    @law(seed=seeds(), kills=[mutants.ignores_the_learning_rate])
    def it_steps_at_the_learning_rate_it_is_told(self, config: Any, seed: int) -> None:
        """At learning rate 0 nothing moves, at first or later; at a thousandth of one it moves less."""
        weights = self.drawn(seed)
        optimizer = self.make(config, list(weights.items()))
        moves = []
        for number, lr in enumerate((0.0, _LR, 0.0, _LR / 1000)):
            start = {name: parameter.detach().clone() for name, parameter in weights.items()}
            self.steps(optimizer, weights, [number], lr)
            moves.append(_distance(start, weights))
        assert moves[0] == moves[2] == 0.0, "it moves at learning rate 0"
        assert 0.0 < moves[3] < moves[1], f"it moves by {moves[1]:.3g}, and by {moves[3]:.3g} at a thousandth of that"

    @law(seed=seeds(), kills=[mutants.climbs])
    def it_descends(self, config: Any, seed: int) -> None:
        """There is a learning rate at which ten steps take it down a bowl."""
        reached = []
        for lr in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
            weights = self.drawn(seed)
            optimizer = self.make(config, list(weights.items()))
            before = _height(weights)
            for _ in range(10):
                for parameter in weights.values():
                    parameter.grad = parameter.detach().clone()
                set_lr(optimizer, lr)
                optimizer.step()
            reached.append(_height(weights) / before)
            if reached[-1] < 1.0:
                return
        raise AssertionError(f"at no learning rate it descends: it comes to {reached} times where it was")

    @law(order=st.permutations(sorted(SHAPES)), seed=seeds(), kills=[mutants.halves_the_first])
    def the_order_of_the_parameters_says_nothing(self, config: Any, order: list[str], seed: int) -> None:
        """Parameters given in another order are stepped the same, bit for bit."""
        expected = self.drawn(seed)
        self.steps(self.make(config, list(expected.items())), expected, [1, 2])
        for names in (order, order[::-1]):
            weights = self.drawn(seed)
            self.steps(self.make(config, [(name, weights[name]) for name in names]), weights, [1, 2])
            assert not _differing(expected, weights), f"{', '.join(_differing(expected, weights))} goes another way"


def _differing(one: Named, other: Named) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def _height(weights: Named) -> float:
    """Return half the squared length of all weights, whose gradient is the weights themselves."""
    return 0.5 * sum(float(parameter.detach().double().square().sum()) for parameter in weights.values())

"""What every sharding owes: each parameter stepped once, along the whole gradient, clipped to the global norm."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any, ClassVar

import torch
from attrs import frozen
from hypothesis import strategies as st
from torch import Tensor, nn

from tangram.core.context import Parallel
from tangram.core.contracts import Sharding
from tangram.core.executor import Executor
from tangram.core.layout import Layout
from tangram.core.model import Model, build_model
from tangram.core.plan import sequential
from tangram.core.records import GradientNorm, Progress
from tangram.testing.laws import Contract, law
from tangram.testing.mutants import sharding as mutants
from tangram.testing.placing import placed
from tangram.testing.ranks import run_ranks
from tangram.testing.samples import normal
from tangram.testing.small import small_experiment
from tangram.testing.strategies import seeds
from tangram.testing.tolerance import assert_close, tolerance

_LRS = (0.5, 0.2)
_LIMITS = st.sampled_from((0.1, 1.0, 50.0))
_SCALES = st.sampled_from((1e-3, 1.0, 1e3))

_RANKS, _SEQUENCES = 2, 4


@cache
def _built() -> Model:
    return build_model(small_experiment("precision.compute=float64"), parallel=Parallel())


def _model(device: str) -> Model:
    """Return the model of a rank that is alone; to copy it takes a tenth of the time that building it does."""
    return placed(deepcopy(_built()), device)


class ShardingContract(Contract):
    """The laws of the slot `sharding`."""

    slot = "sharding"
    optional: ClassVar[Mapping[str, str]] = {
        "ranks": "works among several ranks, which together take the steps that one rank takes"
    }

    @classmethod
    def make(cls, config: Any, parallel: Parallel | None = None) -> Sharding:
        """Return what the config builds for one rank."""
        sharding: Sharding = config.build(parallel or Parallel())
        return sharding

    def attached(self, config: Any) -> tuple[Sharding, Model, Sequence[tuple[str, nn.Parameter]]]:
        """Return a sharding, a model and what the optimizer steps."""
        sharding, model = self.make(config, Parallel(device=torch.device(self.device))), _model(self.device)
        return sharding, model, sharding.attach(model)

    @law(kills=[mutants.forgets_a_parameter, mutants.attaches_a_parameter_twice])
    def every_parameter_is_stepped_once(self, config: Any) -> None:
        """On one rank what the optimizer steps is every parameter of the model, once, under its address."""
        _, model, attached = self.attached(config)
        addresses = [address for address, _ in attached]
        assert sorted(addresses) == sorted(name for name, _ in model.named_parameters()), "the addresses differ"
        assert len({id(parameter) for _, parameter in attached}) == len(attached), "a tensor has two addresses"
        held, whole = (sum(p.numel() for p in some) for some in (dict(attached).values(), model.parameters()))
        assert held == whole, f"{held} values of {whole}"

    @law(
        seed=seeds(),
        scale=_SCALES,
        limit=_LIMITS,
        kills=[mutants.clips_to_twice_the_limit, mutants.clips_each_parameter_alone, mutants.returns_the_norm_of_one],
    )
    def clipping_scales_to_the_global_norm(self, config: Any, seed: int, scale: float, limit: float) -> None:
        """`clip` returns the norm over all gradients, scales a larger one to the limit, and keeps their direction."""
        sharding, model, attached = self.attached(config)
        for bound in (limit, 0.01 * scale, 1e3 * limit * scale):
            _give(model, seed, scale)
            sharding.reduce()
            before = {address: p.grad.clone() for address, p in attached if p.grad is not None}
            expected = math.sqrt(sum(float(grad.double().square().sum()) for grad in before.values()))
            norm = sharding.clip(bound)
            n = sum(grad.numel() for grad in before.values())
            assert norm.broken == (), f"it calls {norm.broken} not finite"
            assert abs(norm.value - expected) <= tolerance(torch.float32, n) * expected, f"{norm.value}, not {expected}"
            factor = min(1.0, bound / expected)
            for address, parameter in attached:
                assert (parameter.grad is None) == (address not in before), f"the gradient of {address} came or went"
                if parameter.grad is not None and factor == 1.0:
                    assert torch.equal(parameter.grad, before[address]), f"{address} is scaled within the limit"
                elif parameter.grad is not None:
                    wanted = factor * before[address]
                    assert_close(parameter.grad, wanted, dtype=torch.float32, length=n, msg=address)

    @law(
        seed=seeds(),
        value=st.sampled_from((math.nan, math.inf, -math.inf)),
        which=st.sets(st.integers(0, 9), min_size=1, max_size=2),
        kills=[mutants.names_nothing, mutants.scales_what_is_broken],
    )
    def what_is_not_finite_is_named_and_left(self, config: Any, seed: int, value: float, which: set[int]) -> None:
        """Gradients that are not finite are named by address, the norm is not finite, and nothing is scaled."""
        sharding, model, attached = self.attached(config)
        _give(model, seed, 10.0)
        given = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        broken = {given[index][0] for index in which}
        for index in which:
            given[index][1].view(-1)[-1] = value
        sharding.reduce()
        before = {address: p.grad.clone() for address, p in attached if p.grad is not None}
        norm = sharding.clip(1.0)
        assert not math.isfinite(norm.value), f"the norm is {norm.value}"
        assert set(norm.broken) == broken, f"it names {sorted(norm.broken)}, not {sorted(broken)}"
        for address, parameter in attached:
            if parameter.grad is not None:
                same = torch.equal(parameter.grad.nan_to_num(), before[address].nan_to_num())
                assert same, f"the gradient of {address} is scaled"

    @law(kills=[mutants.returns_one_at_least])
    def without_any_gradient_the_norm_is_zero(self, config: Any) -> None:
        """Where no parameter has a gradient the norm is 0, and nothing is broken."""
        sharding, _, _ = self.attached(config)
        sharding.reduce()
        assert sharding.clip(1.0) == GradientNorm(0.0)

    @law(seed=seeds(), limit=_LIMITS, kills=[mutants.halves_the_sum, mutants.loses_the_step])
    def two_steps_on_one_rank_are_plain_ones(self, config: Any, seed: int, limit: float) -> None:
        """On one rank two steps of gradient descent leave the weights that they leave in plain torch."""
        sharding, model, attached = self.attached(config)
        plain = _model(self.device)
        for number, lr in enumerate(_LRS):
            for each in (model, plain):
                _give(each, seed + 100 * number, 0.01)
            sharding.reduce()
            sharding.clip(limit)
            nn.utils.clip_grad_norm_(plain.parameters(), limit)
            _descend([parameter for _, parameter in attached], lr)
            _descend(list(plain.parameters()), lr)
            sharding.gather()
        n, expected = sum(p.numel() for p in plain.parameters()), plain.state_dict()
        for name, value in model.state_dict().items():
            # torch adds 1e-6 to the norm that it divides by.
            error = float((value - expected[name]).abs().max())
            assert error <= 1e-6 + tolerance(torch.float64, n), f"{name} is off by {error:.3g}"

    @law(requires="ranks", most=3, kills=[mutants.doubles_the_gradients])
    def ranks_take_the_steps_of_one(self, config: Any) -> None:
        """Two ranks, half of the batch each, leave after two steps the weights and norms that one rank leaves."""
        alone, found = _two_steps(0, 1, config), run_ranks(_two_steps, _RANKS, _RANKS, config)
        for name, value in alone.weights.items():
            kept = sorted(row for each in found if name in each.rows for row in each.rows[name])
            assert not kept or kept == list(range(len(value))), f"rows {kept} of {name} are kept, of {len(value)}"
        for rank, together in enumerate(found):
            for number, (norm, expected) in enumerate(zip(together.norms, alone.norms, strict=True)):
                assert math.isclose(norm, expected, rel_tol=1e-9), f"step {number}: norm {norm} for {expected}"
            assert together.weights.keys() == alone.weights.keys(), f"rank {rank} has other addresses"
            for name, value in alone.weights.items():
                rows = together.rows.get(name, range(len(value)))
                value = value[rows.start : rows.stop]
                assert_close(together.weights[name], value, length=10_000, msg=f"rank {rank}, {name}")


@frozen(eq=False)
class _Taken:
    """Where two steps led: of weights of which a rank keeps some rows, those."""

    weights: Mapping[str, Tensor]
    rows: Mapping[str, range]
    norms: tuple[float, ...]


def _two_steps(rank: int, ranks: int, config: Any) -> _Taken:
    """Take two steps on this rank's rows of two batches."""
    experiment = small_experiment("precision.compute=float64")
    parallel = Parallel(layout=Layout(data_ranks=ranks, rank=rank))
    model = build_model(experiment, parallel=parallel)
    sharding: Sharding = config.build(parallel)
    parameters = [parameter for _, parameter in sharding.attach(model)]
    executor = Executor(model, sequential, 1, parallel, sharding.reduce)
    data, now, norms = experiment.data.build(experiment.train, experiment.model.vocab_size), Progress(), []
    for lr in _LRS:
        batch = data.batch(now, _SEQUENCES)
        executor.run(batch, now)
        norms.append(sharding.clip(1.0).value)
        _descend(parameters, lr)
        sharding.gather()
        model.zero_grad()
        now = now.after(batch)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return _Taken(weights, sharding.rows(), tuple(norms))


def _give(model: Model, seed: int, scale: float) -> None:
    """Give every parameter but the embedding a drawn gradient."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        drawn = normal(*parameter.shape, seed=seed + i, dtype=parameter.dtype) * scale
        parameter.grad = None if name == "embedding.weight" else drawn.to(parameter.device)


@torch.no_grad()
def _descend(parameters: Sequence[nn.Parameter], lr: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.sub_(lr * parameter.grad)
            parameter.grad = None

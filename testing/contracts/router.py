"""What every router owes: a bias that moves the choice and never a gate, and statistics that count it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.context import BuildError, Context
from tangram.core.contracts import Router
from tangram.core.records import Routing
from tangram.testing.contracts.module import DifferentiableContract, Passed
from tangram.testing.laws import law, written
from tangram.testing.mutants import router as mutants
from tangram.testing.samples import context, filled, normal
from tangram.testing.strategies import seeds
from tangram.testing.tolerance import assert_close

_FAR = 1e3
"""A bias beyond the reach of affinities."""

_LEVELS = st.sampled_from((0.0, -2.0, -100.0))
"""What all biases lie around; below zero, so may all biased scores."""


class RouterContract(DifferentiableContract):
    """The laws of the slot `router`.

    Attributes:
        sizes: Numbers of experts to try; it is given the first that it accepts.
    """

    slot = "router"
    dim = 5
    sizes: ClassVar[tuple[int, ...]] = (6, 8, 12, 16, 24, 32, 64, 256)
    optional: ClassVar[Mapping[str, str]] = {
        "normalised": "the gates of every token have the same sum, unless its config says `normalise: false`",
        "groups": "experts lie in `n_groups` groups of consecutive ones, of which a token reaches at most "
        "`top_groups`; both are fields of its config",
    }

    @classmethod
    def make(cls, config: Any, ctx: Context | None = None) -> Any:
        """Return what the config builds."""
        n_experts = cls.n_experts(config)
        module = cls.placed(config.build(ctx or cls.context(), n_experts))
        module.experts_tried = n_experts
        return module

    @classmethod
    def n_experts(cls, config: Any) -> int:
        """Return the number of experts that the config is given.

        Raises:
            ValueError: It accepts none of `sizes`.
        """
        refused: Exception | None = None
        for size in cls.sizes:
            try:
                with torch.device("meta"):
                    config.build(cls.context(), size)
            except (BuildError, ValueError) as error:
                refused = error
            else:
                return size
        raise ValueError(f"it accepts none of {', '.join(map(str, cls.sizes))} experts: {refused}")

    def x(self, rows: int, length: int, seed: int) -> Tensor:
        """Return drawn hidden states [rows, length, D]."""
        return self.placed(normal(rows, length, self.dim, seed=seed, dtype=self.dtype))

    def bias(self, config: Any, level: float, seed: int) -> Tensor:
        """Return drawn expert biases [E] around a level."""
        return self.placed(level + normal(self.n_experts(config), seed=~seed, dtype=torch.float32))

    def no_bias(self, config: Any) -> Tensor:
        """Return zeros [E]."""
        return torch.zeros(self.n_experts(config), device=self.device)

    def passed(self, module: Any, seed: int) -> Passed:
        """Put two sequences through, without bias."""
        x = self.x(2, 4, seed).requires_grad_()
        routing = module(x, torch.zeros(module.experts_tried, device=self.device))
        outputs = {"out": _by_expert(routing), "affinity": routing.stats.affinity}
        return Passed({"x": x}, outputs, {"ids": routing.ids.sort(1).values})

    @law(seed=seeds(), kills=[mutants.rounds_its_gates])
    def it_keeps_the_dtype(self, config: Any, seed: int) -> None:
        """Gates and affinities are computed in float32 or better, whatever the model computes in."""
        for compute in (torch.bfloat16, self.dtype):
            wide = torch.promote_types(compute, torch.float32)
            x = self.x(1, 3, seed).to(compute)
            low, high = (filled(self.make(config, context(self.dim, compute=dtype)), seed) for dtype in (compute, wide))
            routing, expected = low(x, self.no_bias(config)), high(x.to(wide), self.no_bias(config))
            assert_close(_by_expert(routing), _by_expert(expected), length=self.length, dtype=wide, msg="gates")
            assert routing.gates.dtype is routing.stats.affinity.dtype is wide, f"gates are {routing.gates.dtype}"

    @law(level=_LEVELS, seed=seeds(), kills=[mutants.chooses_twice])
    def a_token_chooses_k_different_experts(self, config: Any, level: float, seed: int) -> None:
        """A token chooses `top_k` experts, all different, and has a finite gate for each."""
        module = self.built(config, seed)
        n, routing = self.n_experts(config), module(self.x(2, 5, seed), self.bias(config, level, seed))
        assert routing.ids.dtype is torch.int64
        assert routing.ids.shape == routing.gates.shape == (10, module.top_k)
        assert all(len(set(row)) == module.top_k for row in routing.ids.tolist()), "an expert is chosen twice"
        assert 0 <= int(routing.ids.min()) <= int(routing.ids.max()) < n, "an expert is chosen that is not there"
        assert bool(routing.gates.isfinite().all()), "a gate is not finite"

    @law(
        level=_LEVELS,
        seed=seeds(),
        kills=[mutants.counts_again_when_recomputed, mutants.counts_over_the_batch, mutants.counts_in_floats],
    )
    def every_choice_is_counted_once(self, config: Any, level: float, seed: int) -> None:
        """Every choice is counted once, in its sequence, also where a forward is run again to recompute it."""
        module, n = self.built(config, seed), self.n_experts(config)
        x, bias = self.x(2, 5, seed), self.bias(config, level, seed)
        for _ in range(2):
            routing = module(x, bias)
            stats = routing.stats
            assert torch.equal(stats.ids.flatten(0, 1), routing.ids), "the statistics tell other experts"
            assert stats.load.dtype is stats.top.dtype is torch.int64, f"counts are {stats.load.dtype}"
            for ids, load, top in zip(stats.ids, stats.load, stats.top, strict=True):
                assert torch.equal(load, torch.bincount(ids.flatten(), minlength=n)), "the load is not what was chosen"
                assert int(top.sum()) == 5 * module.top_k, "the unbiased choice is not K experts a token"

    @law(seed=seeds(), kills=[mutants.gates_from_biased_scores])
    def the_bias_moves_who_and_never_how_much(self, config: Any, seed: int) -> None:
        """Where the same experts are chosen, under any bias, their gates are the same."""
        module, bias = self.built(config, seed), self.bias(config, 0.0, seed)
        for token in self.x(1, 4, seed)[0]:
            x = token.view(1, 1, -1)
            expected = module(x, bias)
            chosen = torch.zeros_like(bias).index_fill(0, expected.ids[0], 1.0)
            favoured = bias + chosen * (_FAR + self.bias(config, 0.0, seed + 1).abs())
            for other in (favoured, bias - 7.0):  # more for those who were chosen anyway; the same for all
                actual = module(x, other)
                assert torch.equal(actual.ids.sort(1).values, expected.ids.sort(1).values), "others are chosen"
                assert_close(_by_expert(actual), _by_expert(expected), length=self.length, msg="gates")

    @law(expert=st.integers(0, 5), seed=seeds(), kills=[mutants.ignores_the_bias])
    def a_favoured_expert_is_chosen(self, config: Any, expert: int, seed: int) -> None:
        """An expert whose bias is beyond all others is chosen by every token."""
        bias = self.no_bias(config)
        bias[expert] = _FAR
        routing = self.built(config, seed)(self.x(1, 6, seed), bias)
        assert bool((routing.ids == expert).any(1).all()), "a token does without it"

    @law(seed=seeds(), requires="normalised", kills=[mutants.forgets_to_normalise])
    def the_gates_of_a_token_sum_to_the_scale(self, config: Any, seed: int) -> None:
        """The gates of every token have the same sum, unless the config says `normalise: false`."""
        if not getattr(written(config), "normalise", True):
            return
        sums = self.built(config, seed)(self.x(1, 6, seed), self.bias(config, 0.0, seed)).gates.sum(1)
        assert_close(sums, sums[:1].expand_as(sums), length=self.n_experts(config) + 2)

    @law(level=_LEVELS, seed=seeds(), requires="groups", kills=[mutants.masks_groups_with_zero])
    def an_excluded_group_is_never_chosen(self, config: Any, level: float, seed: int) -> None:
        """A token reaches at most `top_groups` groups, even where every biased score is negative."""
        routing = self.built(config, seed)(self.x(2, 8, seed), self.bias(config, level, seed))
        said = written(config)
        groups = routing.ids // (self.n_experts(config) // said.n_groups)
        reached = max(len(set(row)) for row in groups.tolist())
        assert reached <= said.top_groups, f"a token reaches {reached} groups of at most {said.top_groups}"

    @law(seed=seeds(), kills=[mutants.tops_what_was_chosen])
    def the_unbiased_count_ignores_the_bias(self, config: Any, seed: int) -> None:
        """`top` counts the K best affinities of each token, whatever bias and groups chose."""
        module, tokens = self.built(config, seed), self.x(8, 1, seed)
        stats = module(tokens, self.bias(config, 0.0, seed)).stats
        best = stats.affinity.topk(module.top_k, -1).values[:, -1:]  # of one token each
        counted = torch.where(stats.top > 0, stats.affinity, torch.inf).amin(-1, keepdim=True)
        assert bool((counted >= best).all()), "an expert is counted that is not among the best"
        whole = module(tokens.view(1, 8, -1), self.no_bias(config)).stats
        assert torch.equal(whole.top[0], stats.top.sum(0)), "the bias moves it"

    @law(seed=seeds(), kills=[mutants.sums_affinities])
    def mean_affinities_are_a_distribution(self, config: Any, seed: int) -> None:
        """The mean affinities of a sequence are not negative, and sum to one over the experts."""
        affinity = self.built(config, seed)(self.x(2, 5, seed), self.bias(config, 0.0, seed)).stats.affinity
        assert bool((affinity >= 0).all())
        assert_close(affinity.sum(1), torch.ones_like(affinity[:, 0]), length=self.n_experts(config) + 5)

    @law(seed=seeds(), kills=[mutants.mixes_tokens])
    def a_token_is_routed_by_itself(self, config: Any, seed: int) -> None:
        """A token's experts and gates are what they are alone; a sequence's affinities are the mean of its tokens'."""
        module, x, bias = self.built(config, seed), self.x(2, 4, seed), self.bias(config, 0.0, seed)
        whole, apart = module(x, bias), module(x.view(8, 1, -1), bias)
        assert_close(_by_expert(whole), _by_expert(apart), length=self.length, msg="gates")
        mean = apart.stats.affinity.view(2, 4, -1).mean(1)
        assert_close(whole.stats.affinity, mean, length=self.length, msg="affinities")

    @law(seed=seeds(), kills=[mutants.detaches_the_gates, mutants.detaches_the_affinities])
    def gates_and_affinities_teach_the_router(self, config: Any, seed: int) -> None:
        """A gradient comes to the router through the gates, and through the affinities of its statistics."""
        module, x = self.built(config, seed), self.x(2, 4, seed).requires_grad_()
        routing = module(x, self.no_bias(config))
        for name, value in (("gates", routing.gates), ("affinities", routing.stats.affinity)):
            assert value.requires_grad, f"the {name} carry no gradient"
            if bool((value == value.flatten()[0]).all()):  # the one gate of a token, normalised
                continue
            direction = normal(*value.shape, seed=seed).to(value)
            wrt = [x, *module.parameters()]
            grads = torch.autograd.grad((value * direction).sum(), wrt, allow_unused=True, retain_graph=True)
            assert grads[0] is not None, f"no gradient of the {name} comes to the token"
            assert bool(grads[0].any()), f"the gradient of the {name} is zero for the token"
            reached = any(grad is not None and bool(grad.any()) for grad in grads[1:])
            assert reached, f"the gradient of the {name} is zero for the router"

    @law(seed=seeds(), kills=[mutants.prefers_the_first_expert])
    def renumbered_experts_are_chosen_under_their_new_numbers(self, config: Any, seed: int) -> None:
        """With the experts in reverse, in its weights and the bias, the choice is the same, in reverse."""
        module, bias = self.built(config, seed), self.bias(config, 0.0, seed)
        other = self.make(config)
        other.load_state_dict({name: value.flip(self._of_experts(config)[name]) for name, value in _state(module)})
        x = self.x(2, 4, seed)
        before, after = module(x, bias), other(x, bias.flip(0))
        if not any(self._of_experts(config).values()):  # nothing tells the experts apart but the bias
            return
        assert_close(_by_expert(after).flip(1), _by_expert(before), length=self.length, msg="gates")
        assert torch.equal(after.stats.load.flip(1), before.stats.load), "the load is another"

    def _of_experts(self, config: Any) -> dict[str, list[int]]:
        """Return the dimensions of each tensor of the state that count experts: those that grow with them."""
        shapes = []
        n = self.n_experts(config)
        for size in (n, 2 * n):
            with torch.device("meta"):
                state = _state(config.build(self.context(), size))
            shapes.append({name: value.shape for name, value in state})
        pairs = {name: zip(shapes[0][name], shapes[1][name], strict=True) for name in shapes[0]}
        return {name: [i for i, (one, other) in enumerate(pair) if one != other] for name, pair in pairs.items()}


def _state(module: Router) -> list[tuple[str, Tensor]]:
    return list(module.state_dict().items())


def _by_expert(routing: Routing) -> Tensor:
    """Return the gates by expert, [N, E]; zero where an expert was not chosen."""
    n_experts = routing.stats.load.shape[1]
    zeros = torch.zeros(len(routing.ids), n_experts, dtype=routing.gates.dtype, device=routing.gates.device)
    return zeros.scatter(1, routing.ids, routing.gates)

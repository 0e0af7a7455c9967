"""What every feed-forward owes: each token by itself, in four phases, and its router's choice counted and learned."""

from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

import torch
from attrs import evolve
from hypothesis import strategies as st
from torch import Tensor, nn

from tangram.core.contracts import BalancerConfig, DispatcherConfig, RouterConfig
from tangram.core.plugins import Plugins
from tangram.core.records import Rows
from tangram.testing.contracts.balancer import MOMENTS
from tangram.testing.contracts.module import DifferentiableContract, Passed
from tangram.testing.laws import law, written
from tangram.testing.mutants import feedforward as mutants
from tangram.testing.samples import normal
from tangram.testing.strategies import configs, seeds
from tangram.testing.tolerance import assert_close

_NESTED: Mapping[object, str] = {RouterConfig: "router", BalancerConfig: "balancer", DispatcherConfig: "dispatcher"}
"""Slots inside a feed-forward, by the type of the field."""

_FAR = 1e3
"""A bias beyond the reach of affinities."""


class FeedForwardContract(DifferentiableContract):
    """The laws of the slot `feedforward`."""

    slot = "feedforward"
    dim = 5

    @classmethod
    def parts(cls) -> Mapping[str, st.SearchStrategy[Any]]:
        """Return tangram's own components for what is nested, and a few experts, among which there is a choice."""
        hints = get_type_hints(cls.config_class())
        nested = {name: _ours(_NESTED[hint]) for name, hint in hints.items() if hint in _NESTED}
        return nested | ({"n_experts": st.integers(2, 8)} if "n_experts" in hints else {})

    def x(self, rows: int, length: int, seed: int) -> Tensor:
        """Return drawn hidden states [rows, length, D]."""
        return self.placed(normal(rows, length, self.dim, seed=seed, dtype=self.dtype))

    def passed(self, module: Any, seed: int) -> Passed:
        """Put two sequences through."""
        x = self.x(2, 4, seed).requires_grad_()
        out, stats = module(x)
        if stats is None:
            return Passed({"x": x}, {"out": out})
        return Passed({"x": x}, {"out": out, "affinity": stats.affinity}, {"ids": stats.ids.sort(-1).values})

    @law(seed=seeds(), kills=[mutants.has_a_forward_of_its_own])
    def the_phases_in_order_are_the_forward(self, config: Any, seed: int) -> None:
        """Route, dispatch, compute and combine, one after the other, are the forward."""
        module, x = self.built(config, seed), self.x(2, 3, seed)
        expected = module(x)
        hidden, stats = module.combine(module.compute(module.dispatch(module.route(x))))
        assert torch.equal(hidden, expected.hidden), "the phases give something else"
        assert (stats is None) == (expected.stats is None)
        assert stats is None or torch.equal(stats.load, expected.stats.load), "the phases count something else"

    @law(order=st.permutations(range(6)), seed=seeds(), kills=[mutants.mixes_tokens])
    def a_token_is_transformed_by_itself(self, config: Any, order: list[int], seed: int) -> None:
        """What becomes of a token depends on no other, and not on its place."""
        module, x = self.built(config, seed), self.x(1, 6, seed)
        whole = module(x).hidden
        apart = torch.cat([module(x[:, i : i + 1]).hidden for i in range(6)], 1)
        assert_close(whole, apart, length=self.length, msg="apart")
        assert_close(module(x[:, order]).hidden, whole[:, order], length=self.length, msg="in another order")

    @law(
        seed=seeds(),
        kills=[
            mutants.counts_again_when_recomputed,
            mutants.tells_nothing_of_its_router,
            mutants.tells_of_a_router_that_is_not_there,
        ],
    )
    def its_router_is_counted_once(self, config: Any, seed: int) -> None:
        """With a router, its choices are counted once, also where a forward is run again; without, there are none."""
        module, x = self.built(config, seed), self.x(2, 5, seed)
        for _ in range(2):
            stats = module(x).stats
            assert (stats is None) == (module.n_experts == 0), "a router has statistics, and nothing else has"
            if stats is None:
                return
            assert stats.load.shape == stats.top.shape == stats.affinity.shape == (2, module.n_experts)
            for ids, load in zip(stats.ids, stats.load, strict=True):
                counted = torch.bincount(ids.flatten(), minlength=module.n_experts)
                assert torch.equal(load, counted), "the load is not what was chosen"
            assert int(stats.load.sum()) == 10 * stats.ids.shape[-1], "the load is not K experts a token"

    @law(seed=seeds(), kills=[mutants.leaks_between_experts])
    def an_expert_works_on_its_rows_alone(self, config: Any, seed: int) -> None:
        """What an expert makes of its rows is what it makes of them while all others have none."""
        module = self.built(config, seed)
        sent = module.dispatch(module.route(self.x(2, 4, seed)))
        if sent.rows is None:
            return
        counts, whole = sent.rows.counts, module.compute(sent).rows.rows
        pairs = zip(*(rows.split(counts.tolist()) for rows in (sent.rows.rows, whole)), strict=True)
        for i, (part, expected) in enumerate(pairs):
            alone = torch.where(torch.arange(len(counts), device=counts.device) == i, counts, 0)
            out = module.compute(evolve(sent, rows=Rows(part, alone, sent.rows.handle))).rows.rows
            assert_close(out, expected, length=self.length, msg=f"expert {i}")

    @law(seed=seeds(), kills=[mutants.numbers_its_experts])
    def renumbered_experts_are_the_same_experts(self, config: Any, seed: int) -> None:
        """With the experts in reverse, with their router's rows and biases, the output is the same."""
        module = self.built(config, seed)
        if not module.n_experts:
            return
        module.rebalance(torch.arange(module.n_experts, device=self.device), MOMENTS[1])
        other, dims = self.make(config), self._of_experts(config)
        other.load_state_dict({name: tensor.flip(dims[name]) for name, tensor in module.state_dict().items()})
        x = self.x(2, 4, seed)
        before, after = module(x), other(x)
        assert_close(after.hidden, before.hidden, length=self.length)
        assert torch.equal(after.stats.load.flip(1), before.stats.load), "others are chosen"

    @law(seed=seeds(), kills=[mutants.skips_experts_without_tokens])
    def an_expert_without_tokens_has_a_zero_gradient(self, config: Any, seed: int) -> None:
        """One token gives every parameter a gradient, of zeros where it does not pass: an optimizer steps them all."""
        module = self.built(config, seed)
        out = module(self.x(1, 1, seed))
        named = dict(module.named_parameters())
        grads = torch.autograd.grad(out.hidden.sin().sum(), list(named.values()), allow_unused=True)
        missing = [name for name, grad in zip(named, grads, strict=True) if grad is None]
        assert not missing, f"{', '.join(missing)} has no gradient"

    @law(seed=seeds(), kills=[mutants.detaches_the_router, mutants.detaches_the_affinities])
    def output_and_affinities_teach_the_router(self, config: Any, seed: int) -> None:
        """What the gates or the affinities are made of has a gradient from the output, and from the statistics."""
        module, x = self.built(config, seed), self.x(2, 4, seed)
        routing = module.route(x).routing
        if routing is None:
            return
        out, stats = module(x)
        pairs = {"output": (routing.gates, out), "affinities": (routing.stats.affinity, stats.affinity)}
        for name, (near, far) in pairs.items():
            if bool((near == near.flatten()[0]).all()):  # the one gate of a token, normalised
                continue
            assert far.requires_grad, f"the {name} have no gradient"
            reached = _reached(module, near, seed) - _reached(module, far, seed)
            assert not reached, f"the gradient of the {name} does not come to {', '.join(sorted(reached))}"

    @law(expert=st.integers(0, 7), seed=seeds(), kills=[mutants.routes_without_the_bias])
    def the_router_follows_the_balancer(self, config: Any, expert: int, seed: int) -> None:
        """An expert whose bias is beyond all others is chosen by every token."""
        module = self.built(config, seed)
        if not module.n_experts:
            return
        bias = torch.zeros(module.n_experts, device=self.device)
        bias[expert % module.n_experts] = _FAR
        module.balancer.bias = lambda: bias
        ids = module(self.x(1, 6, seed)).stats.ids
        assert bool((ids == expert % module.n_experts).any(-1).all()), "a token does without it"

    @law(seed=seeds(), kills=[mutants.never_rebalances, mutants.rebalances_a_weight])
    def rebalancing_moves_the_biases_alone(self, config: Any, seed: int) -> None:
        """Rebalancing after a skewed load moves the biases, if the balancer is adaptive, and no other tensor."""
        module = self.built(config, seed)
        if not module.n_experts:
            return
        before = {name: tensor.clone() for name, tensor in _tensors(module).items()}
        bias = module.balancer.bias().clone()
        for now in MOMENTS:
            module.rebalance(torch.arange(module.n_experts, device=self.device), now)
        own = {id(tensor) for tensor in _tensors(module.balancer).values()}
        moved = [name for name, tensor in _tensors(module).items() if not torch.equal(tensor, before[name])]
        others = [name for name in moved if id(_tensors(module)[name]) not in own]
        assert not others, f"it moves {', '.join(others)}"
        adaptive = module.balancer.adaptive
        assert adaptive is not torch.equal(module.balancer.bias(), bias), (
            f"adaptive is {adaptive}, and the biases say no"
        )

    def _of_experts(self, config: Any) -> dict[str, list[int]]:
        """Return the dimensions of each tensor of the state that count experts: those that grow with them."""
        said = written(config)
        states = []
        for each in (said, evolve(said, n_experts=2 * said.n_experts)):
            with torch.device("meta"):
                states.append(self.make(each).state_dict())
        sizes = {name: zip(states[0][name].shape, states[1][name].shape, strict=True) for name in states[0]}
        return {name: [i for i, (one, other) in enumerate(pair) if one != other] for name, pair in sizes.items()}


def _reached(module: nn.Module, value: Tensor, seed: int) -> set[str]:
    """Return which parameters the gradient of a value comes to."""
    named = dict(module.named_parameters())
    direction = normal(*value.shape, seed=seed).to(value)
    grads = torch.autograd.grad((value * direction).sum(), list(named.values()), allow_unused=True, retain_graph=True)
    return {name for name, grad in zip(named, grads, strict=True) if grad is not None and bool(grad.any())}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@cache
def _ours(slot: str) -> st.SearchStrategy[Any]:
    """Return what tangram itself ships for a slot; a dispatcher that rounds on the way has laws of its own for that."""
    entries = [entry for entry in Plugins.discover().registry if entry.mark.slot == slot]
    ours = [entry.config for entry in entries if entry.config.__module__.startswith("tangram.plugins.")]
    drawn = st.one_of([configs(config, few=2) for config in ours])
    return drawn.filter(lambda config: getattr(config, "wire", "compute") == "compute")

"""What every dispatcher owes: each token to each of its experts once, and home weighed by its gates."""

from typing import Any

import torch
from attrs import evolve
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.records import Routing, Rows
from tangram.testing.laws import Contract, law
from tangram.testing.mutants import dispatcher as mutants
from tangram.testing.routed import routings
from tangram.testing.samples import context, normal
from tangram.testing.strategies import seeds
from tangram.testing.tolerance import assert_close

_DIM = 3

_ROUTINGS = routings(st.integers(1, 6))


class DispatcherContract(Contract):
    """The laws of the slot `dispatcher`."""

    slot = "dispatcher"

    @classmethod
    def make(cls, config: Any, n_experts: int = 4) -> Any:
        """Return what the config builds."""
        return config.build(context(_DIM, compute=cls.dtype), n_experts)

    def dispatcher(self, config: Any, routing: Routing) -> Any:
        """Return what the config builds for the experts of a routing."""
        return self.make(config, routing.stats.load.shape[1])

    def x(self, routing: Routing, seed: int) -> Tensor:
        """Return a drawn hidden state for each token of a routing, [N, D]."""
        return normal(len(routing.ids), _DIM, seed=seed, dtype=self.dtype).to(self.device)

    @law(
        routing=_ROUTINGS,
        seed=seeds(),
        kills=[mutants.loses_a_token, mutants.doubles_a_token, mutants.miscounts_an_expert],
    )
    def each_choice_is_one_row(self, config: Any, routing: Routing, seed: int) -> None:
        """Every expert is given the tokens that chose it, each once, and those of the experts before it come first."""
        x, ids = self.x(routing, seed), routing.ids.to(self.device)
        rows = self.dispatcher(config, routing).dispatch(x, ids)
        assert rows.counts.dtype is torch.int64, f"counts are {rows.counts.dtype}"
        n_experts = routing.stats.load.shape[1]
        assert torch.equal(rows.counts, torch.bincount(ids.flatten(), minlength=n_experts)), "the counts are others"
        assert len(rows.rows) == ids.numel(), f"{len(rows.rows)} rows for {ids.numel()} choices"
        for expert, part in enumerate(rows.rows.split(rows.counts.tolist())):
            wanted = x[(ids == expert).any(1)]
            assert torch.equal(_sorted(part), _sorted(wanted)), f"expert {expert} is given other tokens"

    @law(routing=_ROUTINGS, seed=seeds(), kills=[mutants.loses_a_token, mutants.weighs_by_place])
    def rows_come_home_weighed_by_their_gates(self, config: Any, routing: Routing, seed: int) -> None:
        """A token comes home as the sum of gate times what its expert made of it, here a multiple."""
        x, ids, gates = self._sent(routing, seed)
        home = self._there_and_back(config, routing, x, gates)
        assert_close(home, x * (gates * self._factors(routing)[ids]).sum(1, keepdim=True), length=3 * ids.shape[1])

    @law(routing=_ROUTINGS, seed=seeds(), kills=[mutants.detaches_the_gates, mutants.averages_gradients])
    def gradients_go_the_same_way(self, config: Any, routing: Routing, seed: int) -> None:
        """A token's gradient is the sum over its experts; a gate's is its expert's output along the token's."""
        x, ids, gates = self._sent(routing, seed)
        direction = self.x(routing, seed + 2)
        x.requires_grad_()
        gates.requires_grad_()
        home = self._there_and_back(config, routing, x, gates)
        of_x, of_gates = torch.autograd.grad(home, (x, gates), direction, allow_unused=True)
        assert of_x is not None, "no gradient comes to the tokens"
        assert of_gates is not None, "no gradient comes to the gates"
        factors = self._factors(routing)[ids]
        with torch.no_grad():
            expected = direction * (gates * factors).sum(1, keepdim=True)
            assert_close(of_x, expected, length=3 * ids.shape[1], msg="tokens")
            # The terms of a product along D may cancel: what is rounded is their magnitudes.
            size = (x * direction).abs().sum(1, keepdim=True).amax()
            expected = (x * direction).sum(1, keepdim=True) * factors
            assert_close(of_gates + size, expected + size, length=3 * _DIM, msg="gates")

    @law(routing=_ROUTINGS, seed=seeds(), kills=[mutants.sends_gradient_through_the_handle])
    def the_handle_carries_no_gradient(self, config: Any, routing: Routing, seed: int) -> None:
        """A gradient comes to the tokens through their rows, and no other way."""
        x, ids, gates = self._sent(routing, seed)
        x.requires_grad_()
        dispatcher = self.dispatcher(config, routing)
        rows = dispatcher.dispatch(x, ids)
        cut = evolve(rows, rows=rows.rows.detach().requires_grad_())
        home = dispatcher.combine(cut, gates)
        (other,) = torch.autograd.grad(home.sum(), [x], allow_unused=True)
        assert other is None, "the handle carries a gradient"

    @law(
        one=routings(4, top_k=2, sequences=1, length=5),
        other=routings(4, top_k=2, sequences=1, length=5),
        seed=seeds(),
        kills=[mutants.remembers_the_last_one],
    )
    def it_remembers_nothing(self, config: Any, one: Routing, other: Routing, seed: int) -> None:
        """Rows find home whatever was sent out since: micro-batches are in flight side by side."""
        dispatcher = self.make(config, 4)
        sent = [(routing, *self._sent(routing, seed + i)) for i, routing in enumerate((one, other))]
        alone = [self._there_and_back(config, routing, x, gates) for routing, x, _, gates in sent]
        rows = [self._worked(dispatcher.dispatch(x, ids), routing) for routing, x, ids, _ in sent]
        for out, (_, _, _, gates), expected in zip(rows, sent, alone, strict=True):
            assert torch.equal(dispatcher.combine(out, gates), expected), "rows come home to others"

    @law(routing=_ROUTINGS, seed=seeds(), kills=[mutants.widens_to_the_gates])
    def it_keeps_the_dtype(self, config: Any, routing: Routing, seed: int) -> None:
        """What comes home has the dtype that went out, though gates are wider."""
        x, ids, gates = self._sent(routing, seed)
        dispatcher = self.dispatcher(config, routing)
        rows = dispatcher.dispatch(x.bfloat16(), ids)
        assert rows.rows.dtype is torch.bfloat16, f"rows are {rows.rows.dtype}"
        home = dispatcher.combine(rows, gates.float())
        assert home.dtype is torch.bfloat16, f"{home.dtype} comes home"
        exact = x.bfloat16().float() * gates.float().sum(1, keepdim=True)
        assert_close(home, exact, dtype=torch.bfloat16)  # rounded once, at the end

    def _sent(self, routing: Routing, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, ids and gates."""
        gates = routing.gates.detach().clone().to(self.device, self.dtype)
        return self.x(routing, seed), routing.ids.to(self.device), gates

    def _factors(self, routing: Routing) -> Tensor:
        """Return the number [E] by which each expert multiplies."""
        n_experts = routing.stats.load.shape[1]
        return 1 + torch.arange(n_experts, device=self.device, dtype=self.dtype) / 4

    def _worked(self, rows: Rows, routing: Routing) -> Rows:
        """Return the rows as the experts leave them."""
        return evolve(rows, rows=rows.rows * self._factors(routing).repeat_interleave(rows.counts)[:, None])

    def _there_and_back(self, config: Any, routing: Routing, x: Tensor, gates: Tensor) -> Tensor:
        dispatcher = self.dispatcher(config, routing)
        out: Tensor = dispatcher.combine(
            self._worked(dispatcher.dispatch(x, routing.ids.to(self.device)), routing), gates
        )
        return out


def _sorted(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]

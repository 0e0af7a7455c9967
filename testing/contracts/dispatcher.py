"""What every dispatcher owes: each token to each of its experts once, and home weighed by its gates."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count, cycle, product
from typing import Any, ClassVar

import torch
from attrs import astuple, evolve, frozen
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.context import Parallel
from tangram.core.layout import Layout
from tangram.core.records import Routing, Rows
from tangram.testing.laws import Contract, Mutated, law
from tangram.testing.mutants import dispatcher as mutants
from tangram.testing.ranks import run_ranks
from tangram.testing.routed import routings
from tangram.testing.samples import context, normal
from tangram.testing.strategies import seeds
from tangram.testing.tolerance import assert_close

_DIM = 3

_ROUTINGS = routings(st.integers(1, 6))

_WIRES = ("compute", "bf16", "fp8")
_WIDTH = 130
"""Two scales of a row in FP8, one of them of a ragged tile."""


class DispatcherContract(Contract):
    """The laws of the slot `dispatcher`."""

    slot = "dispatcher"
    optional: ClassVar[Mapping[str, str]] = {
        "ranks": "works among several ranks that share out the experts, which together do what one rank does",
        "wire": "has a field `wire`: rows travel as they are (`compute`), in bfloat16 (`bf16`), or in FP8 on their way "
        "out (`fp8`)",
    }
    ranks: ClassVar[int] = 2
    """Ranks that share out the experts where a law has several."""

    @classmethod
    def parts(cls) -> Mapping[str, st.SearchStrategy[Any]]:
        """Return the wire that rounds nothing: of those that do, laws of their own tell."""
        return {"wire": st.just("compute")} if "wire" in cls.capabilities() else {}

    @classmethod
    def make(cls, config: Any, n_experts: int = 4) -> Any:
        """Return what the config builds."""
        return cls.placed(config.build(context(_DIM, compute=cls.dtype), n_experts))

    def dispatcher(self, config: Any, routing: Routing) -> Any:
        """Return what the config builds for the experts of a routing."""
        return self.make(config, routing.stats.load.shape[1])

    def x(self, routing: Routing, seed: int) -> Tensor:
        """Return a drawn hidden state for each token of a routing, [N, D]."""
        return self.placed(normal(len(routing.ids), _DIM, seed=seed, dtype=self.dtype))

    @law(
        routing=_ROUTINGS,
        seed=seeds(),
        kills=[mutants.loses_a_token, mutants.doubles_a_token, mutants.miscounts_an_expert],
    )
    def each_choice_is_one_row(self, config: Any, routing: Routing, seed: int) -> None:
        """Every expert is given the tokens that chose it, each once, and those of the experts before it come first."""
        x, ids = self.x(routing, seed), routing.ids
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
        of_x, of_gates = torch.autograd.grad((home * direction).sum(), (x, gates), allow_unused=True)
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

    @law(
        requires="ranks",
        most=3,
        kills=[
            mutants.doubles_a_token,
            mutants.detaches_the_gates,
            mutants.averages_gradients,
            mutants.weighs_all_alike,
            mutants.turns_round_the_rows_of_an_expert,
        ],
    )
    def ranks_do_what_one_does(self, config: Any) -> None:
        """Whatever tokens each rank has, experts are given and make of them what one rank gives all, in its order."""
        tries = [(config, case) for case in self._cases(config)]
        found = run_ranks(_together, self.ranks, self.ranks, tries)
        for (_, case), parts in zip(tries, zip(*found, strict=True), strict=True):
            spread = _spread(case)
            x, gates, factors = (each.clone().requires_grad_() for each in (spread.x, spread.gates, spread.factors))
            rows = torch.cat([x[(spread.ids == expert).any(1)] for expert in range(len(factors))])
            home = x * (gates.unsqueeze(2) * factors[spread.ids]).sum(1)
            grads = torch.autograd.grad((home * spread.direction).sum(), (x, gates, factors))
            _Sent(rows.detach(), spread.counts, home.detach(), *grads).compare(_Sent.of(parts))

    @law(requires="wire", seed=seeds(), kills=[mutants.rounds_coarsely, mutants.shares_a_scale])
    def a_wire_rounds_each_row_by_itself_and_once(self, config: Any, seed: int) -> None:
        """Rows arrive rounded as their wire says, other rows or not; what was rounded once is changed no more."""
        x = self.placed((normal(4, _WIDTH, seed=seed) * torch.tensor([[1e-6], [1.0], [0.0], [1e4]])).to(self.dtype))
        ids = torch.zeros(len(x), 1, dtype=torch.int64, device=self.device)
        for wire in _WIRES:
            dispatcher = self.make(_wired(config, wire), 1)
            arrived = dispatcher.dispatch(x, ids).rows
            if wire == "fp8":
                peaks = torch.stack([part.abs().amax(1) for part in x.split(128, 1)], 1).repeat_interleave(128, 1)
                # Half a step of the scale, at most twice the peak over 448, is 2^-10 of it where codes are not normal.
                limit = (x.abs() * 2**-4).clamp_min(2**-10 * peaks[:, :_WIDTH].clamp_min(1e-4) * 2 / 448)
                assert ((arrived - x).abs() <= limit).all(), "rows are rounded more than E4M3 does"
            else:
                assert torch.equal(arrived, x if wire == "compute" else x.bfloat16().to(x.dtype)), "rows are changed"
            assert torch.equal(dispatcher.dispatch(arrived, ids).rows, arrived), f"rows in {wire} are rounded again"
            alone = torch.cat([dispatcher.dispatch(row, ids[:1]).rows for row in x.split(1)])
            assert torch.equal(alone, arrived), f"how a row in {wire} is rounded depends on the others"

    @law(requires="wire", seed=seeds(), kills=[mutants.comes_home_as_it_went])
    def what_comes_home_is_not_in_fp8(self, config: Any, seed: int) -> None:
        """Outputs and the gradient of rows come home in bfloat16; the gradient of outputs is sent as rows are."""
        x, direction = (self.placed(normal(4, _WIDTH, seed=seed + i, dtype=self.dtype)) for i in (0, 1))
        ids, gates = torch.zeros(len(x), 1, dtype=torch.int64, device=self.device), torch.ones_like(x[:, :1])
        x.requires_grad_()
        for wire in _WIRES:
            dispatcher = self.make(_wired(config, wire), 1)
            rows = dispatcher.dispatch(x, ids)
            made = x.detach().clone().requires_grad_()
            home = dispatcher.combine(evolve(rows, rows=made), gates)
            (of_x,) = torch.autograd.grad((rows.rows * direction).sum(), x)
            (of_made,) = torch.autograd.grad((home * direction).sum(), made)
            dtype = self.dtype if wire == "compute" else torch.bfloat16
            assert torch.equal(home, made.to(dtype).to(self.dtype)), "outputs come home otherwise"
            assert torch.equal(of_x, direction.to(dtype).to(self.dtype)), "the gradient of rows comes home otherwise"
            sent = dispatcher.dispatch(direction, ids).rows
            assert torch.equal(of_made, sent), "the gradient of outputs is sent otherwise"

    @law(requires="wire", most=3, kills=[mutants.shares_a_scale])
    def ranks_round_as_one_does(self, config: Any) -> None:
        """Whatever the wire, several ranks give what one does; sums that go home in parts may be rounded for each."""
        ranks, cases = self.ranks if "ranks" in self.capabilities() else 1, self._cases(config)
        # Each wire has every skew and every cut; all pairs of them are tried without rounding.
        wires = (_wired(config, _WIRES[1 + (case.skew + case.cut) % 2]) for case in cases)
        tries = list(zip(wires, cases, strict=True))
        alone, found = _together(0, 1, tries), run_ranks(_together, ranks, ranks, tries)
        for expected, parts in zip(alone, zip(*found, strict=True), strict=True):
            expected.compare(_Sent.of(parts), summed=torch.bfloat16)

    def _cases(self, config: Any) -> list["_Case"]:
        """Return what ranks do in one go, as they take a while to start."""
        try:
            _make(config, _parallel(0, self.ranks), self.ranks)
        except ValueError:
            reject()
        pairs = product(range(len(_SKEWS)), range(len(_CUTS)))
        drawn = zip(pairs, cycle((1, 3)), cycle((1, 2, None)), count(step=10), strict=False)
        return [_Case(self.ranks, *pair, share, top_k, seed) for pair, share, top_k, seed in drawn]

    def _sent(self, routing: Routing, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, ids and gates."""
        gates = routing.gates.detach().clone().to(self.dtype)
        return self.x(routing, seed), routing.ids, gates

    def _factors(self, routing: Routing) -> Tensor:
        """Return the number [E] by which each expert multiplies."""
        n_experts = routing.stats.load.shape[1]
        return 1 + torch.arange(n_experts, device=self.device, dtype=self.dtype) / 4

    def _worked(self, rows: Rows, routing: Routing) -> Rows:
        """Return the rows as the experts leave them."""
        return evolve(rows, rows=rows.rows * self._factors(routing).repeat_interleave(rows.counts)[:, None])

    def _there_and_back(self, config: Any, routing: Routing, x: Tensor, gates: Tensor) -> Tensor:
        dispatcher = self.dispatcher(config, routing)
        out: Tensor = dispatcher.combine(self._worked(dispatcher.dispatch(x, routing.ids), routing), gates)
        return out


def _sorted(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


def _wired(config: Any, wire: str) -> Any:
    """Return the config with another wire."""
    if isinstance(config, Mutated):
        return evolve(config, config=_wired(config.config, wire))
    return evolve(config, wire=wire)


def _parallel(rank: int, ranks: int) -> Parallel:
    """Return the surroundings of one of several ranks that share out the experts."""
    return Parallel(layout=Layout(data_ranks=ranks, expert_ranks=ranks, rank=rank))


def _make(config: Any, parallel: Parallel, n_experts: int) -> Any:
    """Return what the config builds for a rank."""
    return config.build(evolve(context(_WIDTH), parallel=parallel), n_experts)


_SKEWS = (0.0, 0.3, 100.0, -100.0)
"""How much more each expert is wanted than the next one: the same by all tokens if it is large."""

_CUTS: tuple[Callable[[int, int, int], int], ...] = (
    lambda rank, ranks, n: rank * n // ranks,
    lambda rank, ranks, n: n if rank else 0,
    lambda rank, ranks, n: n * (rank // ranks),
    lambda rank, ranks, n: min(rank, n),
)
"""At which of n tokens a rank begins: all have as many; the first or the last has all; the last all but one each."""


@frozen
class _Case:
    """What tokens of several ranks are drawn from, which is sent to the ranks in their place.

    Attributes:
        ranks: Ranks.
        skew: Which of `_SKEWS`.
        cut: Which of `_CUTS`.
        share: Experts on each rank.
        top_k: Experts of a token; None for all of them.
        seed: Of all that is drawn.
    """

    ranks: int
    skew: int
    cut: int
    share: int
    top_k: int | None
    seed: int


@frozen(eq=False)
class _Spread:
    """Tokens of several ranks.

    Attributes:
        ids: Experts of all tokens [N, K].
        ends: Where each rank's tokens begin, and the last one's end.
        x: The tokens [N, D].
        gates: Their gates [N, K].
        factors: What each expert multiplies its rows by [E, D].
        direction: The gradient at what comes home [N, D].
    """

    ids: Tensor
    ends: Sequence[int]
    x: Tensor
    gates: Tensor
    factors: Tensor
    direction: Tensor

    @property
    def counts(self) -> Tensor:
        """Rows of each expert [E]."""
        return torch.bincount(self.ids.flatten(), minlength=len(self.factors))

    def of(self, layout: Layout) -> slice:
        """Return which tokens are a rank's: all of them if it is alone."""
        return slice(*self.ends[layout.rank : layout.rank + 2]) if layout.ranks > 1 else slice(None)


def _spread(case: _Case) -> _Spread:
    """Return the tokens of a case."""
    n_experts, n = case.ranks * case.share, 7
    k = min(n_experts, case.top_k or n_experts)
    wanted = normal(n, n_experts, seed=case.seed) - _SKEWS[case.skew] * torch.arange(n_experts)
    ends = [_CUTS[case.cut](rank, case.ranks, n) for rank in range(case.ranks + 1)]
    ends[-1] = n
    shapes = ((n, _WIDTH), (n, k), (n_experts, _WIDTH), (n, _WIDTH))
    drawn = (normal(*shape, seed=case.seed + number) for number, shape in enumerate(shapes, start=1))
    return _Spread(wanted.topk(k).indices, ends, *drawn)


@frozen(eq=False)
class _Sent:
    """What became of a rank's tokens and experts: their rows and counts, what came home, and gradients."""

    rows: Tensor
    counts: Tensor
    home: Tensor
    of_x: Tensor
    of_gates: Tensor
    of_factors: Tensor

    @classmethod
    def of(cls, parts: Sequence["_Sent"]) -> "_Sent":
        """Return that of all ranks."""
        return cls(*map(torch.cat, zip(*(astuple(part, recurse=False) for part in parts), strict=True)))

    def compare(self, found: "_Sent", summed: torch.dtype = torch.float64) -> None:
        """Assert that the ranks found the same; what they summed up was rounded to a dtype on its way."""
        assert torch.equal(found.counts, self.counts), "experts are given other numbers of rows"
        assert torch.equal(found.rows, self.rows), "experts are given other rows, or in another order"
        top_k = self.of_gates.shape[1]
        assert_close(found.home, self.home, dtype=summed, length=top_k + 1, msg="what comes home")
        assert_close(found.of_x, self.of_x, dtype=summed, length=top_k + 1, msg="the gradient of tokens")
        # The terms of a product along D may cancel: what is rounded is their magnitudes.
        size = float(self.of_gates.abs().amax()) + float(self.rows.abs().amax() * _WIDTH)
        assert_close(found.of_gates + size, self.of_gates + size, length=_WIDTH, msg="the gradient of gates")
        length = max(len(self.of_x), 1)
        assert_close(found.of_factors, self.of_factors, length=length, msg="the gradient of experts")


def _together(rank: int, ranks: int, tries: Sequence[tuple[Any, _Case]]) -> list[_Sent]:
    """Send this rank's tokens of each case by its config, and return what became of them."""
    parallel = _parallel(rank, ranks)
    return [_there_and_back(config, parallel, _spread(case)) for config, case in tries]


def _there_and_back(config: Any, parallel: Parallel, spread: _Spread) -> _Sent:
    dispatcher, mine = _make(config, parallel, len(spread.factors)), spread.of(parallel.layout)
    x, gates = (each[mine].clone().requires_grad_() for each in (spread.x, spread.gates))
    share = parallel.layout.share(len(spread.factors))
    factors = spread.factors[share.start : share.stop].clone().requires_grad_()
    rows = dispatcher.dispatch(x, spread.ids[mine])
    worked = rows.rows * factors.repeat_interleave(rows.counts, 0)
    home = dispatcher.combine(evolve(rows, rows=worked), gates)
    total = (home * spread.direction[mine]).sum()
    grads = torch.autograd.grad(total, (x, gates, factors), materialize_grads=True)
    return _Sent(rows.rows.detach(), rows.counts, home.detach(), *grads)

"""The dispatcher of one process: no token lost, none doubled, none confused."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.plugins.moe.local import LocalConfig
from tangram.testing import assert_close, seeds
from tangram.testing.samples import context, normal


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Draw ids [N, K], distinct in a row, of E experts: even, or with all tokens on the first experts."""
    n_experts = draw(st.integers(1, 6))
    top_k, n_tokens = draw(st.integers(1, n_experts)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(seeds()))
    skew = draw(st.sampled_from((0.0, 100.0)))
    scores = torch.rand(n_tokens, n_experts, generator=generator) - skew * torch.arange(n_experts)
    return scores.topk(top_k).indices, n_experts


@given(drawn=choices(), seed=seeds())
def test_each_choice_becomes_one_row_of_its_token_sorted_by_expert(drawn, seed):
    ids, n_experts = drawn
    x = normal(len(ids), 3, seed=seed)
    rows = LocalConfig().build(context(3), n_experts).dispatch(x, ids)
    assert torch.equal(rows.counts, torch.bincount(ids.flatten(), minlength=n_experts))
    for expert, part in enumerate(rows.rows.split(rows.counts.tolist())):
        wanted = x[(ids == expert).any(1)]
        assert torch.equal(part, wanted), expert


@given(drawn=choices(), seed=seeds())
def test_rows_come_home_weighted_by_their_gates(drawn, seed):
    ids, n_experts = drawn
    x, gates = normal(len(ids), 3, seed=seed), normal(*ids.shape, seed=seed + 1).abs()
    dispatcher = LocalConfig().build(context(3), n_experts)
    home = dispatcher.combine(dispatcher.dispatch(x, ids), gates)
    assert_close(home, x * gates.sum(1, keepdim=True), length=2 * ids.shape[1])


@given(drawn=choices(), seed=seeds())
def test_gradients_take_the_same_way(drawn, seed):
    ids, n_experts = drawn
    x, gates = (
        normal(len(ids), 2, seed=seed).requires_grad_(),
        normal(*ids.shape, seed=seed + 1).requires_grad_(),
    )
    dispatcher = LocalConfig().build(context(2), n_experts)

    def there_and_back(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return dispatcher.combine(dispatcher.dispatch(x, ids), gates)

    assert torch.autograd.gradcheck(there_and_back, (x, gates))

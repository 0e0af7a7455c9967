"""The naive reference against facts from elsewhere: published counts, closed forms, cases by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paper import (
    GQAShape,
    MLAShape,
    Yarn,
    balance_terms,
    batch_balance,
    bias_update,
    fill,
    gqa,
    linear,
    mla,
    mla_keys_values,
    mla_queries,
    moe,
    moe_weights,
    rms_norm,
    rope_interleaved,
    route_group_limited,
    sequence_balance,
    swiglu,
)
from torch import Tensor

SMALL = MLAShape(n_heads=2, nope_dim=4, rope_dim=4, value_dim=3)
V3_HEADS = MLAShape(n_heads=128, nope_dim=128, rope_dim=64, value_dim=128)


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


# --- the published numbers ----------------------------------------------------------------------------------


def test_v3_weights_have_the_published_parameter_counts() -> None:
    dim, vocabulary = 7168, 129280
    attention = count(V3_HEADS.weights(dim, q_rank=1536, kv_rank=512))
    experts = count(moe_weights(dim, n_experts=256, hidden=2048, n_shared=1)) + 256
    dense = attention + 3 * dim * 18432 + 2 * dim
    sparse = attention + experts + 2 * dim
    assert attention == 187_107_328
    assert dense == 583_483_392
    assert sparse == 11_507_286_272
    assert 2 * vocabulary * dim + dim + 3 * dense + 58 * sparse == 671_026_419_200


def test_an_mtp_module_has_the_published_unique_parameters() -> None:
    dim = 7168
    block = count(V3_HEADS.weights(dim, 1536, 512)) + count(moe_weights(dim, 256, 2048, 1)) + 256 + 2 * dim
    assert block + 2 * dim * dim + 3 * dim == 11_610_068_224


def test_yarn_has_the_released_scale_and_band() -> None:
    yarn = Yarn()
    assert yarn.magnitude() == pytest.approx(1.3688879454, abs=5e-11)
    with_yarn = MLAShape(n_heads=1, nope_dim=128, rope_dim=64, value_dim=128, yarn=yarn)
    assert with_yarn.scale() == pytest.approx(0.1352337789, abs=5e-11)
    assert V3_HEADS.scale() == pytest.approx(192**-0.5)
    assert yarn.band(64, 10000.0) == (10, 23)


@pytest.mark.parametrize(("pair", "ratio"), [(0, 1), (10, 1), (11, 0.925), (16, 0.55), (23, 0.025), (31, 0.025)])
def test_yarn_slows_each_pair_by_the_published_ratio(pair: int, ratio: float) -> None:
    vector = torch.zeros(64, dtype=torch.float64)
    vector[2 * pair] = 1.0
    turned = rope_interleaved(vector, 1, 10000.0, Yarn())
    angle = ratio * 10000 ** (-2 * pair / 64)
    assert float(turned[2 * pair]) == pytest.approx(math.cos(angle), abs=1e-12)
    assert float(turned[2 * pair + 1]) == pytest.approx(math.sin(angle), rel=1e-9)


def test_rms_norm_by_hand() -> None:
    x, weight = torch.tensor([[3.0, -4.0], [0.0, 0.0]]), torch.tensor([2.0, 0.5])
    expected = torch.tensor([[6.0, -2.0], [0.0, 0.0]], dtype=torch.float64) / math.sqrt(12.5 + 3.5)
    assert close(rms_norm(x, weight, eps=3.5), expected)


# --- rotary positions ---------------------------------------------------------------------------------------


def test_rope_turns_neighbours_by_hand() -> None:
    turned = rope_interleaved(torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64), 3, 100.0)
    expected = [math.cos(3), math.sin(3), -math.sin(0.3), math.cos(0.3)]
    assert close(turned, torch.tensor(expected, dtype=torch.float64))


@given(
    seed=st.integers(0, 99),
    position=st.integers(0, 5000),
    other=st.integers(0, 5000),
    shift=st.integers(0, 5000),
)
def test_rope_keeps_lengths_and_sees_only_distances(seed: int, position: int, other: int, shift: int) -> None:
    query, key = normal(2, 8, seed=seed)

    def score(a: int, b: int) -> Tensor:
        return (rope_interleaved(query, a, 1e4, Yarn()) * rope_interleaved(key, b, 1e4, Yarn())).sum()

    assert torch.allclose(score(position, other), score(position + shift, other + shift), atol=1e-9)
    assert close(rope_interleaved(query, position, 1e4).norm(), query.norm())


# --- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_rank", [None, 5])
def test_mla_equals_its_absorbed_form(q_rank: int | None) -> None:
    """Scores and outputs taken in the latent, as one shared key and value of width kv_rank (+ rope)."""
    dim, kv_rank, length = 6, 5, 4
    weights = fill(SMALL.weights(dim, q_rank, kv_rank), seed=1)
    h, segments = normal(length, dim, seed=2), torch.zeros(length, dtype=torch.int64)
    positions = torch.arange(length)
    up = weights["kv_b"].view(SMALL.n_heads, SMALL.nope_dim + SMALL.value_dim, kv_rank)
    joint = h @ weights["kv_a"].T
    latents = rms_norm(joint[:, :kv_rank], weights["kv_norm"])
    ropes = torch.stack([rope_interleaved(joint[t, kv_rank:], t, SMALL.theta) for t in range(length)])
    rows = []
    for t in range(length):
        heads = []
        for i, query in enumerate(mla_queries(h[t], weights, SMALL, t)):
            absorbed = query[: SMALL.nope_dim] @ up[i, : SMALL.nope_dim]
            scores = latents[: t + 1] @ absorbed + ropes[: t + 1] @ query[SMALL.nope_dim :]
            context = torch.softmax(scores * 8**-0.5, 0) @ latents[: t + 1]
            heads.append(up[i, SMALL.nope_dim :] @ context)
        rows.append(weights["o"] @ torch.cat(heads))
    assert close(mla(h, weights, SMALL, positions, segments), torch.stack(rows))


def test_mla_norms_the_latents_and_not_the_rotary_key() -> None:
    weights = fill(SMALL.weights(6, 5, 5), seed=3)
    h = normal(6, seed=4)
    scaled = {**weights, "kv_a": weights["kv_a"] * 10}
    keys, values = mla_keys_values(h, weights, SMALL, 2)
    loud_keys, loud_values = mla_keys_values(h, scaled, SMALL, 2)
    assert torch.allclose(loud_values[0], values[0], rtol=1e-4)
    assert torch.allclose(loud_keys[0][:4], keys[0][:4], rtol=1e-4)
    assert close(loud_keys[1][4:], 10 * keys[0][4:])
    queries = mla_queries(h, weights, SMALL, 2)
    loud = mla_queries(h, {**weights, "q_a": weights["q_a"] * 10}, SMALL, 2)
    assert torch.allclose(loud[1], queries[1], rtol=1e-4)


def test_the_last_rows_of_each_query_and_key_turn_with_the_position() -> None:
    """Before the rotation the heads are slices of one product, so at position 0 they are those slices."""
    shape = MLAShape(n_heads=2, nope_dim=3, rope_dim=2, value_dim=3)
    weights = fill(shape.weights(6, None, 5), seed=3)
    h = normal(6, seed=4)
    still, moved = mla_queries(h, weights, shape, 0), mla_queries(h, weights, shape, 9)
    assert close(torch.cat(still), weights["q"] @ h)
    keys, moved_keys = (mla_keys_values(h, weights, shape, position)[0] for position in (0, 9))
    for before, after in zip(still + keys, moved + moved_keys, strict=True):
        assert close(before[:3], after[:3])
        assert close(rope_interleaved(before[3:], 9, shape.theta), after[3:])
        assert not close(before[3:], after[3:])


def test_a_lone_token_attends_to_itself() -> None:
    weights = fill(SMALL.weights(6, None, 5), seed=5)
    h = normal(1, 6, seed=6)
    _, values = mla_keys_values(h[0], weights, SMALL, 7)
    alone = mla(h, weights, SMALL, torch.tensor([7]), torch.tensor([0]))
    assert close(alone[0], linear(weights["o"], torch.cat(values)))


def run_mla(h: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
    return mla(h, fill(SMALL.weights(6, 5, 5), seed=7), SMALL, positions, segments)


def run_gqa(h: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
    shape = GQAShape(n_heads=4, n_kv_heads=2, head_dim=4)
    return gqa(h, fill(shape.weights(6), seed=8), shape, positions, segments)


@pytest.mark.parametrize("attention", [run_mla, run_gqa])
def test_attention_is_causal_and_keeps_to_its_segment(attention) -> None:
    h = normal(7, 6, seed=9)
    segments = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    packed = attention(h, positions, segments)
    assert close(packed[:2], attention(h[:2], positions[:2], segments[:2]))
    assert close(packed[3:], attention(h[3:], positions[3:] + 11, segments[3:]))
    assert not close(packed[3:], attention(h, positions, torch.zeros_like(segments))[3:])


def test_gqa_heads_of_a_group_share_their_key_and_value() -> None:
    """With keys and values repeated for each query head it is the ordinary multi-head attention of torch."""
    shape = GQAShape(n_heads=4, n_kv_heads=2, head_dim=2)
    weights = fill(shape.weights(6), seed=10)
    h, zeros = normal(5, 6, seed=11), torch.zeros(5, dtype=torch.int64)

    def split(name: str, heads: int) -> Tensor:
        return (h @ weights[name].T).view(5, heads, 2).transpose(0, 1).repeat_interleave(4 // heads, 0)

    expected = torch.nn.functional.scaled_dot_product_attention(
        split("q", 4), split("k", 2), split("v", 2), is_causal=True
    )
    expected = expected.transpose(0, 1).reshape(5, 8) @ weights["o"].T
    assert close(gqa(h, weights, shape, zeros, zeros), expected)


# --- routing ------------------------------------------------------------------------------------------------


def routed(affinities: list[float], bias: list[float], **settings) -> tuple[dict[int, float], Tensor]:
    """Route one token whose sigmoid affinities are given: the centroids are the inverse sigmoids."""
    logits = torch.tensor([[math.log(s / (1 - s))] for s in affinities], dtype=torch.float64)
    routes, normalised = route_group_limited(
        torch.ones(1, 1, dtype=torch.float64), logits, torch.tensor(bias, dtype=torch.float64), **settings
    )
    return {i: float(gate) for i, gate in routes[0].items()}, normalised[0]


def test_routing_by_hand_where_every_biased_score_is_negative() -> None:
    """Biased: -4.5 -4.6 | -4.1 -4.9 | -4.3 -4.35; sums -9.1, -9.0, -8.65; in groups 2 and 1 best 2, 4, 5.

    Multiplying the excluded group by zero would choose 0 and 1; groups by their maximum would begin with 1.
    """
    affinities = [0.5, 0.4, 0.9, 0.1, 0.2, 0.8]
    bias = [-5.0, -5.0, -5.0, -5.0, -4.5, -5.15]
    gates, normalised = routed(affinities, bias, top_k=3, n_groups=3, top_groups=2, scale=2.5)
    assert sorted(gates) == [2, 4, 5]
    total = 0.9 + 0.2 + 0.8
    assert gates[2] == pytest.approx(2.5 * 0.9 / total)
    assert gates[4] == pytest.approx(2.5 * 0.2 / total)
    assert close(normalised, torch.tensor(affinities, dtype=torch.float64) / 2.9)
    only, _ = routed(affinities, bias, top_k=2, n_groups=3, top_groups=1, scale=2.5)
    assert sorted(only) == [4, 5]


def test_a_group_is_judged_by_its_two_best() -> None:
    """Groups of three: 0.9 + 0.1 is above 0.5 + 0.45, though all three sum to 1.1 against 1.35."""
    gates, _ = routed([0.9, 0.1, 0.1, 0.5, 0.45, 0.4], [0.0] * 6, top_k=1, n_groups=2, top_groups=1)
    assert list(gates) == [0]


def test_the_bias_moves_the_choice_and_not_the_gate() -> None:
    gates, normalised = routed([0.5, 0.4, 0.1], [0.0, -0.2, 0.3], top_k=2, normalise=False)
    assert gates == pytest.approx({0: 0.5, 2: 0.1})
    assert close(normalised, torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64))


def test_unnormalised_gates_are_scaled_affinities() -> None:
    gates, _ = routed([0.5, 0.25, 0.75], [0.0, 0.0, 0.0], top_k=2, scale=16.0, normalise=False)
    assert gates == pytest.approx({2: 12.0, 0: 8.0})


def test_softmax_affinities_compete() -> None:
    u, centroids = normal(3, 4, seed=12), normal(6, 4, seed=13)
    routes, affinities = route_group_limited(u, centroids, torch.zeros(6), top_k=6, score="softmax", normalise=False)
    assert close(affinities, torch.softmax(u @ centroids.T, -1))
    assert all(float(sum(route.values())) == pytest.approx(1) for route in routes)


@given(seed=st.integers(0, 999), shift=st.floats(-9, 9))
def test_a_common_bias_changes_nothing_and_gates_sum_to_the_scale(seed: int, shift: float) -> None:
    u, centroids, bias = normal(4, 5, seed=seed), normal(8, 5, seed=seed + 1), normal(8, seed=seed + 2)
    settings = {"top_k": 3, "n_groups": 4, "top_groups": 2, "scale": 2.5}
    routes, _ = route_group_limited(u, centroids, bias, **settings)
    shifted, _ = route_group_limited(u, centroids, bias + shift, **settings)
    for route, other in zip(routes, shifted, strict=True):
        assert set(route) == set(other)
        assert len(route) == 3
        assert len({expert // 2 for expert in route}) <= 2
        assert float(sum(route.values())) == pytest.approx(2.5)


def test_equal_experts_act_as_one_whatever_the_gates() -> None:
    weights = fill(moe_weights(6, n_experts=4, hidden=3, n_shared=2), seed=14)
    weights["gate_up"] = weights["gate_up"][:1].repeat(4, 1, 1)
    weights["down"] = weights["down"][:1].repeat(4, 1, 1)
    u = normal(5, 6, seed=15)
    routes, _ = route_group_limited(u, weights["centroids"], torch.zeros(4), top_k=2, scale=2.5)
    for t, row in enumerate(moe(u, weights, routes)):
        shared = swiglu(u[t], weights["shared_gate_up"], weights["shared_down"])
        assert close(row, shared + 2.5 * swiglu(u[t], weights["gate_up"][3], weights["down"][3]))


def test_a_token_passes_through_its_own_experts_only() -> None:
    weights = fill(moe_weights(6, n_experts=4, hidden=3, n_shared=0), seed=16)
    u = normal(2, 6, seed=17)
    rows = moe(u, weights, [{2: torch.tensor(0.5)}, {0: torch.tensor(1.0), 3: torch.tensor(2.0)}])
    outputs = [swiglu(u[t], weights["gate_up"][i], weights["down"][i]) for t, i in ((0, 2), (1, 0), (1, 3))]
    assert close(rows, torch.stack([0.5 * outputs[0], outputs[1] + 2 * outputs[2]]))


def test_swiglu_gates_with_the_first_half() -> None:
    gate_up = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    output = swiglu(torch.ones(1), gate_up, torch.tensor([[5.0]]))
    assert float(output) == pytest.approx(5 * 3 * 2 / (1 + math.exp(-2)))


# --- balance ------------------------------------------------------------------------------------------------


@given(experts=st.integers(1, 9), tokens=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_balance_terms_sum_to_experts_and_one(experts: int, tokens: int, seed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    affinities = torch.sigmoid(normal(tokens, experts, seed=seed))
    f, p = balance_terms(affinities, top_k)
    assert sum(f) == pytest.approx(experts)
    assert float(p.sum()) == pytest.approx(1)
    assert float(sequence_balance(torch.full_like(affinities, 0.3), top_k)) == pytest.approx(1)


def test_a_collapsed_router_pays_experts_over_k() -> None:
    affinities = torch.tensor([[1.0, 1.0, 0, 0, 0, 0]] * 3, dtype=torch.float64)
    assert float(sequence_balance(affinities, 2)) == pytest.approx(3)
    assert float(sequence_balance(affinities, 2, chosen=[[4, 5]] * 3)) == pytest.approx(0)


def test_balance_within_sequences_is_stricter_than_over_the_batch() -> None:
    """Two sequences that each collapse on another half are balanced together: 2 each, 1 over the batch."""
    first = torch.tensor([[0.5, 0.5, 0, 0]] * 2, dtype=torch.float64)
    second = first.flip(1)
    assert float(sequence_balance(first, 2)) == pytest.approx(2)
    assert float(sequence_balance(second, 2)) == pytest.approx(2)
    assert float(batch_balance([first, second], 2)) == pytest.approx(1)


def test_the_balance_gradient_flows_through_the_affinities_alone() -> None:
    """With f held, d loss / d affinity[t, i] is (f_i - sum_j f_j s'_j) / (S * sum_j s_j)."""
    affinities = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]], dtype=torch.float64, requires_grad=True)
    sequence_balance(affinities, 1).backward()
    f = torch.tensor([1.5, 1.5, 0.0], dtype=torch.float64)
    rows = affinities.detach()
    assert close(affinities.grad, (f - (rows * f).sum(1, keepdim=True)) / 2)


def test_the_bias_of_an_overloaded_expert_falls_by_the_speed() -> None:
    moved = bias_update(torch.tensor([0.5, 0.5, 0.5]), [9, 3, 6], 0.25)
    assert moved.tolist() == [0.25, 0.75, 0.5]


# --- gradients ----------------------------------------------------------------------------------------------


def test_the_reference_has_the_gradients_of_its_values() -> None:
    shape = MLAShape(n_heads=1, nope_dim=2, rope_dim=2, value_dim=2, yarn=Yarn())
    weights = fill(shape.weights(3, 2, 2) | moe_weights(3, 4, 2, 1), seed=32)
    row = torch.arange(3)

    def layer(h: Tensor, *leaves: Tensor) -> Tensor:
        named = dict(zip(weights, leaves, strict=True))
        h = h + mla(h, named, shape, row, torch.zeros_like(row))
        routes, _ = route_group_limited(h, named["centroids"], torch.zeros(4), top_k=2)
        return moe(h, named, routes)

    leaves = [normal(3, 3, seed=33), *weights.values()]
    assert torch.autograd.gradcheck(layer, [leaf.requires_grad_() for leaf in leaves])

"""The compiled operations on few rows say what plain torch says, and only where they are meant to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import numbers

from tangram import kernels
from tangram.kernels import few_rows
from tangram.kernels.compiled import compiler
from tangram.testing import assert_close

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler: plain torch runs")

ROWS = st.integers(0, 5)
SEEDS = st.integers(0, 99)


@pytest.fixture(autouse=True)
def _as_by_default():
    """Choose as a user does who says nothing: other tests of this folder ask for kernels."""
    with kernels.use("auto"):
        yield


def on_both(operation):
    """Return what plain torch makes of it, and the compiled code."""
    with torch.inference_mode():
        with kernels.use("reference"):
            plain = operation()
        return plain, operation()


def shown(monkeypatch):
    """Return a list that grows with every call of the compiled code."""
    calls, call = [], few_rows._call

    def counted(name, *arguments):
        calls.append(name)
        return call(name, *arguments)

    monkeypatch.setattr(few_rows, "_call", counted)
    return calls


@given(rows=ROWS, columns=st.integers(1, 70), seed=SEEDS)
def test_rmsnorm(rows, columns, seed):
    x, weight = numbers(rows, 2, columns, seed=seed), numbers(columns, seed=seed + 1)
    plain, ours = on_both(lambda: kernels.rmsnorm(x, weight, 1e-5))
    assert_close(ours, plain, length=columns)


@given(rows=ROWS, width=st.integers(1, 40), size=st.sampled_from([0.1, 1.0, 30.0, 200.0]), seed=SEEDS)
def test_swiglu(rows, width, size, seed):
    x = numbers(rows, 2 * width, seed=seed) * size
    plain, ours = on_both(lambda: kernels.swiglu(x))
    assert_close(ours, plain, length=4)


@given(batch=st.integers(1, 3), length=ROWS, heads=st.integers(1, 3), pairs=st.integers(1, 9), seed=SEEDS)
def test_rotate_a_part_of_every_head(batch, length, heads, pairs, seed):
    x = numbers(batch, length, heads, 2 * pairs + 3, seed=seed)[..., 3:]
    positions = torch.arange(length).expand(batch, -1) + torch.arange(batch)[:, None] * 1000
    cos, sin = kernels.rotation(positions, kernels.frequencies(2 * pairs, 1e4), torch.float32)
    plain, ours = on_both(lambda: kernels.rotate(x, cos, sin))
    assert_close(ours, plain, length=2)


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(1, 4),
    heads=st.integers(1, 6),
    rank=st.integers(1, 40),
    rope=st.integers(0, 9),
    most=st.integers(1, 4),
    seed=SEEDS,
)
def test_mla_decode(batch, tokens, heads, rank, rope, most, seed):
    stream = torch.Generator().manual_seed(seed)
    q = 3 * numbers(batch, tokens, heads, rank + rope, seed=seed)
    blocks = numbers(batch * most + 1, 16, rank + rope, seed=seed + 1)
    table = torch.randperm(len(blocks), generator=stream)[: batch * most].view(batch, most).to(torch.int32)
    lengths = torch.randint(0, 16 * most + 1, (batch,), generator=stream)
    plain, ours = on_both(lambda: kernels.mla_decode(q, blocks, table, lengths, 0.3, rank))
    assert_close(ours, plain, length=rank + rope + 16 * most)


@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=8), k=st.integers(1, 40), n=st.integers(1, 9), seed=SEEDS
)
def test_grouped_matmul(counts, k, n, seed):
    rows, weight = numbers(sum(counts), k, seed=seed), numbers(len(counts), n, k, seed=seed + 1)
    sizes = torch.tensor(counts)
    plain, ours = on_both(lambda: kernels.grouped_matmul_forward(rows, weight, sizes))
    assert_close(ours, plain, length=k)


def test_counts_that_do_not_fit_are_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match="counts sum to 3, but there are 2 rows"):
        kernels.grouped_matmul_forward(torch.zeros(2, 4), torch.zeros(2, 4, 4), torch.tensor([1, 2]))


@given(tokens=ROWS, top_k=st.integers(1, 3), experts=st.integers(3, 9), columns=st.integers(1, 40), seed=SEEDS)
def test_tokens_in_the_order_of_their_experts_and_back(tokens, top_k, experts, columns, seed):
    stream = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=stream).argsort(-1)[:, :top_k]
    plain, ours = on_both(lambda: kernels.order_by_expert(ids, experts))
    for name in ("index", "inverse", "counts", "slots"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    rows, gates = numbers(tokens * top_k, columns, seed=seed), numbers(tokens, top_k, seed=seed + 1)
    plain, ours = on_both(lambda: kernels.unpermute(rows, gates, plain))
    assert_close(ours, plain, length=top_k)


@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 4),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3)]),
    size=st.integers(1, 4),
    level=st.sampled_from([0.0, -5.0]),
    data=st.data(),
)
def test_choose_and_weigh(batch, length, groups, size, level, data):
    n_groups, top_groups = groups
    top_k = data.draw(st.integers(1, size * top_groups))
    affinity = numbers(batch, length, n_groups * size, seed=data.draw(SEEDS)).sigmoid() + level
    plain, ours = on_both(lambda: kernels.choose(affinity, top_k, n_groups, top_groups))
    assert torch.equal(ours.sort(-1).values, plain.sort(-1).values)
    ids, positive = ours, affinity.abs()
    for normalise in (True, False):
        plain, ours = on_both(lambda n=normalise: kernels.weigh(positive, ids, 2.5, n))
        assert torch.equal(ours.load, plain.load)
        assert torch.equal(ours.top, plain.top)
        assert_close(ours.gates, plain.gates, length=top_k)
        assert_close(ours.mean, plain.mean, length=length * n_groups * size)


def test_what_is_not_a_number_still_chooses_distinct_experts():
    affinity = torch.full((1, 1, 8), float("nan"))
    with torch.inference_mode():
        ids = kernels.choose(affinity, 3, 4, 2)
    assert len(set(ids.flatten().tolist())) == 3
    assert int(ids.min()) >= 0 and int(ids.max()) < 8


def test_they_run_in_inference_mode_on_few_rows_of_float32(monkeypatch):
    calls, weight = shown(monkeypatch), torch.ones(4)
    for x, runs in (
        (torch.zeros(few_rows.MOST, 4), True),
        (torch.zeros(few_rows.MOST + 1, 4), False),
        (torch.zeros(1, 4, dtype=torch.bfloat16), False),
        (torch.zeros(1, 4, dtype=torch.float64), False),
    ):
        calls.clear()
        kernels.rmsnorm(x, weight, 1e-5)
        with torch.no_grad():
            kernels.rmsnorm(x, weight, 1e-5)
        assert not calls
        with torch.inference_mode():
            kernels.rmsnorm(x, weight, 1e-5)
        assert bool(calls) is runs


@given(batch=st.integers(1, 2), length=ROWS, heads=st.integers(1, 3), nope=st.integers(1, 9), seed=SEEDS)
def test_absorb_and_expand(batch, length, heads, nope, seed):
    rank, rope, value = 11, 4, 5
    w_k, w_v = numbers(heads, nope + value, rank, seed=seed).split([nope, value], 1)
    q, means = numbers(batch, length, heads, nope + rope, seed=seed + 1), numbers(batch, length, heads, rank, seed=seed)
    plain, ours = on_both(lambda: kernels.absorb(q, w_k))
    assert_close(ours, plain, length=nope)
    plain, ours = on_both(lambda: kernels.expand(means, w_v))
    assert_close(ours, plain, length=rank)


@given(batch=st.integers(1, 2), length=ROWS, pairs=st.integers(1, 9), far=st.integers(0, 10**6))
def test_rotation_far_away(batch, length, pairs, far):
    positions = far + torch.arange(batch * length).view(batch, length)
    table = kernels.frequencies(2 * pairs, 1e4)
    plain, ours = on_both(lambda: kernels.rotation(positions, table, torch.float32))
    for one, other in zip(plain, ours, strict=True):
        assert_close(other, one, length=1)


def test_what_is_of_another_dtype_beside_the_rows_is_left_to_torch():
    x, weight = numbers(2, 8, seed=0), numbers(8, seed=1).double()
    plain, ours = on_both(lambda: kernels.rmsnorm(x, weight, 1e-5))
    assert torch.equal(ours, plain)
    ids = torch.tensor([[1, 0]], dtype=torch.int32)
    with torch.inference_mode():
        assert not few_rows.orders(ids)


@given(rows=st.integers(1, 9), inner=st.integers(1, 90), outer=st.integers(1, 9), seed=SEEDS)
def test_product_transposed(rows, inner, outer, seed):
    x, weight = numbers(rows, 2, inner, seed=seed), numbers(outer, inner, seed=seed + 1)
    plain, ours = on_both(lambda: kernels.product_transposed(x, weight))
    assert_close(ours, plain, length=inner)


@given(rows=st.integers(2, 9), inner=st.integers(1, 90), heads=st.integers(1, 6), seed=SEEDS)
@torch.inference_mode()
def test_a_row_is_summed_alike_whichever_rows_stand_beside_it(rows, inner, heads, seed):
    x, weight = numbers(rows, inner, seed=seed), numbers(5, inner, seed=seed + 1)
    together = kernels.product_transposed(x, weight)
    assert torch.equal(together, torch.cat([kernels.product_transposed(row, weight) for row in x.split(1)]))
    counts = torch.tensor([rows, 0])
    by_expert = kernels.grouped_matmul_forward(x, torch.stack([weight, -weight]), counts)
    assert torch.equal(by_expert, together)
    q, blocks = numbers(1, rows, heads, inner, seed=seed), numbers(3, 64, inner, seed=seed + 2)
    table, rank = torch.tensor([[2, 0, 1]], dtype=torch.int32), -(-inner // 2)
    whole = kernels.mla_decode(q, blocks, table, torch.tensor([130]), 0.5, rank)
    for place in range(rows):
        length = torch.tensor([130 - rows + place + 1])
        alone = kernels.mla_decode(q[:, place : place + 1], blocks, table, length, 0.5, rank)
        assert torch.equal(whole[:, place : place + 1], alone)

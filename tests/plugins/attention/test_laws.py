"""What every attention owes: causality, isolation, and a cache that changes nothing."""

import pytest
import torch
from attrs import evolve
from builders import SMALL_MLA
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.contracts import Attention, AttentionConfig
from tangram.plugins.attention.gqa import GQAConfig
from tangram.testing import assert_close, seeds
from tangram.testing.samples import context, documents, filled, normal

DIM = 6
LENGTH = 120
CONFIGS = {
    "mla": SMALL_MLA,
    "mla without q_rank": evolve(SMALL_MLA, q_rank=None, value_dim=9),
    "gqa": GQAConfig(n_heads=4, n_kv_heads=2, head_dim=4),
    "mha": GQAConfig(n_heads=2, head_dim=4),
    "mqa": GQAConfig(n_heads=3, n_kv_heads=1, head_dim=2),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def built(config: AttentionConfig, seed: int = 0) -> Attention:
    return filled(config.build(context(DIM)), seed)


def single(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return documents([[0] * length] * batch)


@st.composite
def cuts(draw: st.DrawFn, batch: int = 2, length: int = 7) -> list[list[int]]:
    """Draw document numbers, not decreasing, of `batch` rows."""
    starts = st.lists(st.booleans(), min_size=length - 1, max_size=length - 1)
    return [torch.tensor([0, *draw(starts)]).cumsum(0).tolist() for _ in range(batch)]


def changed(x: Tensor, where: Tensor, seed: int) -> Tensor:
    return torch.where(where[..., None], normal(*x.shape, seed=seed), x)


@EVERY
@given(segments=cuts(), at=st.integers(1, 6), seed=seeds())
def test_the_future_changes_nothing_before_it(config, segments, at, seed):
    module, x = built(config), normal(2, 7, DIM, seed=seed)
    later = torch.arange(7).expand(2, 7) >= at
    before, after = (module(value, *documents(segments)) for value in (x, changed(x, later, seed + 1)))
    assert_close(after[:, :at], before[:, :at], length=LENGTH)
    assert not torch.equal(after[:, at:], before[:, at:])


@EVERY
@given(segments=cuts(), row=st.integers(0, 1), at=st.integers(0, 6), seed=seeds())
def test_a_document_sees_itself_alone(config, segments, row, at, seed):
    module, x = built(config), normal(2, 7, DIM, seed=seed)
    positions, numbers = documents(segments)
    others = torch.ones(2, 7, dtype=torch.bool)
    others[row] = numbers[row] != numbers[row, at]
    before, after = (module(value, positions, numbers) for value in (x, changed(x, others, seed + 1)))
    assert_close(after[~others], before[~others], length=LENGTH)
    alone = x[row][~others[row]][None]
    wanted = module(alone, *single(1, alone.shape[1]))[0]
    assert_close(before[row][~others[row]], wanted, length=LENGTH)


@EVERY
def test_every_token_sees_all_of_its_past(config):
    module, x = built(config), normal(1, 5, DIM, seed=1).requires_grad_()
    out = module(x, *single(1, 5))
    for i in range(5):
        (grad,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
        assert grad[0, : i + 1].abs().amax(1).min() > 1e-6
        assert not grad[0, i + 1 :].any()


@EVERY
@given(segments=cuts(batch=3), seed=seeds())
def test_a_row_does_not_know_the_others(config, segments, seed):
    module, x = built(config), normal(3, 7, DIM, seed=seed)
    positions, numbers = documents(segments)
    whole = module(x, positions, numbers)
    for i in range(3):
        alone = module(x[i : i + 1], positions[i : i + 1], numbers[i : i + 1])
        assert_close(whole[i : i + 1], alone, length=LENGTH)


@EVERY
@given(split=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=seeds())
@torch.no_grad()
def test_any_split_through_the_cache_is_one_forward(config, split, seed):
    length = sum(split)
    module, x = built(config), normal(2, length, DIM, seed=seed)
    positions, segments = single(2, length)
    expected = module(x, positions, segments)
    for sizes in (split, [1] * length, [length]):
        cache = module.new_cache(2, length + 3)
        pieces = (t.split(sizes, 1) for t in (x, positions, segments))
        out = torch.cat([module(*piece, cache) for piece in zip(*pieces, strict=True)], 1)
        assert_close(out, expected, length=LENGTH)
        assert cache.lengths.tolist() == [length] * 2


def step(module: Attention, x: Tensor, cache: object, starts: list[int]) -> Tensor:
    positions = torch.tensor(starts)[:, None] + torch.arange(x.shape[1])
    return module(x, positions, torch.zeros_like(positions), cache)


@EVERY
@given(kept=st.lists(st.integers(0, 4), min_size=2, max_size=2), seed=seeds())
@torch.no_grad()
def test_what_is_forgotten_was_never_seen(config, kept, seed):
    module, x, more = built(config), normal(2, 4, DIM, seed=seed), normal(2, 3, DIM, seed=seed + 1)
    cache = module.new_cache(2, 8)
    step(module, x, cache, [0, 0])
    cache.truncate(torch.tensor(kept))
    out = step(module, more, cache, kept)
    for row, n in enumerate(kept):
        fresh = module.new_cache(1, 8)
        if n:
            step(module, x[row : row + 1, :n], fresh, [0])
        assert_close(out[row : row + 1], step(module, more[row : row + 1], fresh, [n]), length=LENGTH)


@EVERY
@given(rows=st.lists(st.integers(0, 1), min_size=1, max_size=3), seed=seeds())
@torch.no_grad()
def test_a_fork_continues_its_row_and_leaves_the_original_alone(config, rows, seed):
    module, x = built(config), normal(2, 3, DIM, seed=seed)
    cache = module.new_cache(2, 6)
    step(module, x, cache, [0, 0])
    fork = cache.fork(torch.tensor(rows))
    continued = normal(len(rows), 2, DIM, seed=seed + 1)
    out = step(module, continued, fork, [3] * len(rows))
    for i, row in enumerate(rows):
        whole = torch.cat([x[row], continued[i]])[None]
        assert_close(out[i], module(whole, *single(1, 5))[0, 3:], length=LENGTH)
    assert cache.lengths.tolist() == [3, 3]
    own = normal(2, 1, DIM, seed=seed + 2)
    whole = module(torch.cat([x, own], 1), *single(2, 4))[:, 3:]
    assert_close(step(module, own, cache, [3, 3]), whole, length=LENGTH)


@EVERY
@pytest.mark.parametrize("compute", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_cache_holds_what_is_declared(config, compute):
    module = config.build(context(DIM, compute=compute))
    cache = module.new_cache(2, 9)
    assert cache.nbytes == 0
    x = normal(2, 4, DIM, seed=1, dtype=compute)
    assert module(x, *single(2, 4), cache).dtype == compute
    assert cache.nbytes == 2 * 4 * module.cache_width * compute.itemsize
    cache.truncate(torch.tensor([1, 4]))
    assert cache.nbytes == 5 * module.cache_width * compute.itemsize


def test_mla_keeps_the_latent_and_the_shared_key_and_gqa_keys_and_values():
    assert built(SMALL_MLA).cache_width == SMALL_MLA.kv_rank + SMALL_MLA.rope_dim
    assert built(CONFIGS["gqa"]).cache_width == 2 * 2 * 4
    assert built(CONFIGS["mqa"]).cache_width == 2 * 1 * 2


@EVERY
def test_the_same_seed_gives_the_same_output_and_another_one_another(config):
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(config.build(context(DIM))(normal(1, 3, DIM, seed=0), *single(1, 3)))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@EVERY
def test_it_builds_without_memory_and_keeps_its_addresses(config):
    with torch.device("meta"):
        bare = config.build(context(DIM))
    assert all(parameter.is_meta for parameter in bare.parameters())
    real = built(config)
    bare.load_state_dict(real.state_dict(), assign=True)
    x = normal(1, 3, DIM, seed=1)
    assert torch.equal(bare(x, *single(1, 3)), real(x, *single(1, 3)))

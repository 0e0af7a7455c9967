"""Any order of appending, truncating, forking, handing over and dropping, against a forward over everything."""

import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Attention, AttentionConfig, Cache
from tangram.core.layers import FullPrecision
from tangram.plugins.attention.gqa import GQAConfig
from tangram.plugins.attention.mla import MLAConfig
from tangram.testing import assert_close

LENGTH = 70
DIM = 8
CONFIGS = (
    MLAConfig(n_heads=2, q_rank=5, kv_rank=4, nope_dim=3, rope_dim=2, value_dim=3),
    GQAConfig(n_heads=2, head_dim=4),
)
WORDS = torch.randn(9, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
"""Hidden states of which sequences are made: token i has row i."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["tangram.plugins.attention.cache"], "BLOCK", 16)


def built(config: AttentionConfig) -> Attention:
    torch.manual_seed(0)
    module = config.build(Context(dim=DIM, init_std=0.5, precision=FullPrecision(torch.float64)))
    return module.requires_grad_(False)


class Caches(RuleBasedStateMachine):
    """Caches beside lists of the tokens that they should hold."""

    caches = Bundle("caches")
    config: AttentionConfig

    def __init__(self) -> None:
        super().__init__()
        self.module = built(self.config)
        self.held: dict[int, tuple[Cache, list[list[int]]]] = {}

    def whole(self, tokens: Sequence[int]) -> Tensor:
        """Return the attention's output [1, S, D] of a sequence, without a cache."""
        positions = torch.arange(len(tokens))[None]
        return self.module(WORDS[torch.tensor(tokens)][None], positions, torch.zeros_like(positions))

    def add(self, cache: Cache, rows: list[list[int]]) -> int:
        number = max(self.held, default=-1) + 1
        self.held[number] = (cache, rows)
        return number

    @rule(target=caches, batch=st.integers(1, 2))
    def begin(self, batch: int) -> int:
        return self.add(self.module.new_cache(batch, LENGTH), [[] for _ in range(batch)])

    @rule(number=caches, count=st.integers(1, 20), seed=st.integers(0, 999))
    def append(self, number: int, count: int, seed: int) -> None:
        cache, rows = self.held[number]
        new = torch.randint(len(WORDS), (len(rows), count), generator=torch.Generator().manual_seed(seed))
        starts = torch.tensor([len(row) for row in rows])
        if len(rows) and int(starts.max()) + count > LENGTH:
            with pytest.raises(ValueError, match=f"the cache holds {LENGTH} tokens"):
                self.module(WORDS[new], starts[:, None] + torch.arange(count), torch.zeros_like(new), cache)
            return
        out = self.module(WORDS[new], starts[:, None] + torch.arange(count), torch.zeros_like(new), cache)
        for row, tokens, got in zip(rows, new.tolist(), out, strict=True):
            row += tokens
            assert_close(got, self.whole(row)[0, -count:], length=LENGTH)

    @rule(number=caches, data=st.data())
    def truncate(self, number: int, data: st.DataObject) -> None:
        cache, rows = self.held[number]
        lengths = [data.draw(st.integers(0, len(row))) for row in rows]
        cache.truncate(torch.tensor(lengths, dtype=torch.int64))
        for row, length in zip(rows, lengths, strict=True):
            del row[length:]

    @rule(target=caches, number=caches, data=st.data())
    def fork(self, number: int, data: st.DataObject) -> int:
        cache, rows = self.held[number]
        chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=3)) if rows else []
        return self.add(cache.fork(torch.tensor(chosen, dtype=torch.int64)), [list(rows[i]) for i in chosen])

    @rule(giver=caches, taker=caches, data=st.data())
    def hand_over(self, giver: int, taker: int, data: st.DataObject) -> None:
        (source, rows), (cache, others) = self.held[giver], self.held[taker]
        if rows and len(others) < 4:
            row = data.draw(st.integers(0, len(rows) - 1))
            cache.admit(source.kept(row).clone())
            others.append(list(rows[row]))

    @rule(number=consumes(caches))
    def drop(self, number: int) -> None:
        del self.held[number]

    @invariant()
    def they_count_what_they_hold(self) -> None:
        width = self.module.cache_width * torch.float64.itemsize
        for cache, rows in self.held.values():
            assert cache.lengths.tolist() == [len(row) for row in rows]
            assert cache.nbytes == width * sum(map(len, rows))


@pytest.mark.parametrize("config", CONFIGS, ids=["mla", "gqa"])
def test_whatever_is_done_to_caches_they_continue_what_they_hold(config: AttentionConfig) -> None:
    machine = type("Machine", (Caches,), {"config": config}).TestCase
    machine.settings = settings(max_examples=15, stateful_step_count=15)
    case = machine("runTest")
    case.runTest()

"""What every attention owes: causality, documents kept apart, and a cache that changes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.contracts import Attention, Cache
from tangram.core.recorded import Recorded
from tangram.testing.contracts.module import DifferentiableContract, Passed
from tangram.testing.laws import law
from tangram.testing.mutants import attention as mutants
from tangram.testing.samples import context, documents, filled, normal
from tangram.testing.strategies import seeds
from tangram.testing.tolerance import assert_close

_LENGTH = 7
_ROOM = 256
"""Tokens for which a cache is asked: a whole number of blocks, whatever their size."""


@st.composite
def _cuts(draw: st.DrawFn, rows: int = 2) -> list[list[int]]:
    """Draw document numbers, not decreasing, of `rows` rows."""
    starts = st.lists(st.booleans(), min_size=_LENGTH - 1, max_size=_LENGTH - 1)
    return [torch.tensor([0, *draw(starts)]).cumsum(0).tolist() for _ in range(rows)]


class AttentionContract(DifferentiableContract):
    """The laws of the slot `attention`."""

    slot = "attention"
    optional: ClassVar[Mapping[str, str]] = {
        "cache": "continues from a cache: prefill, decoding and any split of both are one forward"
    }

    def x(self, rows: int, length: int, seed: int) -> Tensor:
        """Return drawn hidden states [rows, length, D]."""
        return self.placed(normal(rows, length, self.dim, seed=seed, dtype=self.dtype))

    def documents(self, segments: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return positions, which start anew with each document, and segments, both [B, S]."""
        return self.placed(documents(segments))

    def single(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Return positions and segments of rows that are one document each, both [rows, length]."""
        return self.documents([[0] * length] * rows)

    def passed(self, module: Any, seed: int) -> Passed:
        """Put two packed rows through."""
        x = self.x(2, 5, seed).requires_grad_()
        return Passed({"x": x}, {"out": module(x, *self.documents([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]))})

    @law(segments=_cuts(), at=st.integers(1, _LENGTH - 1), seed=seeds(), kills=[mutants.sees_the_future])
    def the_future_changes_nothing_before_it(self, config: Any, segments: list[list[int]], at: int, seed: int) -> None:
        """What comes later changes nothing before it, and something after."""
        module, x = self.built(config), self.x(2, _LENGTH, seed)
        later = torch.arange(_LENGTH, device=x.device).expand(2, _LENGTH) >= at
        changed = torch.where(later[..., None], self.x(2, _LENGTH, seed + 1), x)
        before, after = (module(value, *self.documents(segments)) for value in (x, changed))
        assert_close(after[:, :at], before[:, :at], length=self.length)
        assert not torch.equal(after[:, at:], before[:, at:]), "what is changed changes nothing"

    @law(
        segments=_cuts(),
        row=st.integers(0, 1),
        at=st.integers(0, _LENGTH - 1),
        seed=seeds(),
        kills=[mutants.leaks_across_documents],
    )
    def a_document_sees_itself_alone(
        self, config: Any, segments: list[list[int]], row: int, at: int, seed: int
    ) -> None:
        """A document in a packed row gives what it gives alone."""
        module, x = self.built(config), self.x(2, _LENGTH, seed)
        positions, numbers = self.documents(segments)
        inside = numbers[row] == numbers[row, at]
        packed = module(x, positions, numbers)[row][inside]
        alone = x[row][inside][None]
        assert_close(packed, module(alone, *self.single(1, alone.shape[1]))[0], length=self.length)

    @law(segments=_cuts(rows=3), seed=seeds(), kills=[mutants.mixes_rows])
    def a_row_does_not_know_the_others(self, config: Any, segments: list[list[int]], seed: int) -> None:
        """Row i of a batch gives what it gives alone."""
        module, x = self.built(config), self.x(3, _LENGTH, seed)
        positions, numbers = self.documents(segments)
        whole = module(x, positions, numbers)
        for i in range(3):
            alone = module(x[i : i + 1], positions[i : i + 1], numbers[i : i + 1])
            assert_close(whole[i : i + 1], alone, length=self.length)

    @law(
        requires="cache",
        split=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        seed=seeds(),
        kills=[mutants.restarts_positions_when_cached, mutants.drops_the_oldest_when_cached],
    )
    @torch.no_grad()
    def any_split_through_the_cache_is_one_forward(self, config: Any, split: list[int], seed: int) -> None:
        """Prefill, decoding token by token, and any split of both give what one forward gives."""
        length = sum(split)
        module, x = self.built(config), self.x(2, length, seed)
        positions, segments = self.single(2, length)
        expected = module(x, positions, segments)
        for sizes in (split, [1] * length, [length]):
            cache = module.new_cache(2, length + 3)
            pieces = (t.split(sizes, 1) for t in (x, positions, segments))
            out = torch.cat([module(*piece, cache) for piece in zip(*pieces, strict=True)], 1)
            assert_close(out, expected, length=self.length)
            assert cache.lengths.tolist() == [length] * 2, "lengths say another number of tokens"

    @law(
        requires="cache",
        kept=st.lists(st.integers(0, 4), min_size=2, max_size=2),
        seed=seeds(),
        kills=[mutants.truncates_nothing],
    )
    @torch.no_grad()
    def what_is_forgotten_was_never_seen(self, config: Any, kept: list[int], seed: int) -> None:
        """A truncated cache continues as one that never held more; rows may keep different lengths."""
        module, x, more = self.built(config), self.x(2, 4, seed), self.x(2, 3, seed + 1)
        cache = module.new_cache(2, 8)
        _step(module, x, cache, [0, 0])
        cache.truncate(torch.tensor(kept))
        out = _step(module, more, cache, kept)
        for row, n in enumerate(kept):
            fresh = module.new_cache(1, 8)
            if n:
                _step(module, x[row : row + 1, :n], fresh, [0])
            assert_close(out[row : row + 1], _step(module, more[row : row + 1], fresh, [n]), length=self.length)

    @law(
        requires="cache",
        rows=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        seed=seeds(),
        kills=[mutants.forks_the_first_row],
    )
    @torch.no_grad()
    def a_fork_continues_its_row_and_leaves_the_original_alone(self, config: Any, rows: list[int], seed: int) -> None:
        """A fork continues the rows that it was given, and what is appended to it is not in the original."""
        module, x = self.built(config), self.x(2, 3, seed)
        cache = module.new_cache(2, 6)
        _step(module, x, cache, [0, 0])
        fork = cache.fork(torch.tensor(rows))
        continued = self.x(len(rows), 2, seed + 1)
        out = _step(module, continued, fork, [3] * len(rows))
        for i, row in enumerate(rows):
            whole = torch.cat([x[row], continued[i]])[None]
            assert_close(out[i], module(whole, *self.single(1, 5))[0, 3:], length=self.length)
        own = self.x(2, 1, seed + 2)
        whole = module(torch.cat([x, own], 1), *self.single(2, 4))[:, 3:]
        assert_close(_step(module, own, cache, [3, 3]), whole, length=self.length)

    @law(
        requires="cache",
        row=st.integers(0, 1),
        seed=seeds(),
        kills=[mutants.hands_over_the_first_row],
    )
    @torch.no_grad()
    def a_sequence_handed_over_goes_on_elsewhere(self, config: Any, row: int, seed: int) -> None:
        """What is kept of a sequence lets another cache go on with it, behind the sequences that it has."""
        module, x = self.built(config), self.x(2, 4, seed)
        cache, other = module.new_cache(2, 6), module.new_cache(1, 6)
        _step(module, x, cache, [0, 0])
        own = self.x(1, 2, seed + 1)
        _step(module, own, other, [0])
        other.admit(cache.kept(row))
        more = self.x(2, 1, seed + 2)
        out = _step(module, more, other, [2, 4])
        for i, before in enumerate((own, x[row : row + 1])):
            whole = torch.cat([before, more[i : i + 1]], 1)
            assert_close(out[i], module(whole, *self.single(1, whole.shape[1]))[0, -1:], length=self.length)

    @law(
        requires="cache",
        count=st.integers(1, 3),
        seed=seeds(),
        kills=[mutants.looks_at_what_is_kept, mutants.does_not_count_what_runs_again],
    )
    @torch.inference_mode()
    def a_steady_step_may_run_again(self, config: Any, count: int, seed: int) -> None:
        """While its cache says that it is steady, a forward that was recorded and runs again gives what it would."""
        # Recordings are made where operations on few rows are compiled: in float32, on a CPU.
        module = filled(self.make(config, context(self.dim, compute=torch.float32)), seed)
        cache, x = module.new_cache(2, 8 * count), normal(2, 8 * count, self.dim, seed=seed, dtype=torch.float32)
        x = self.placed(x)
        positions, segments = self.single(2, 8 * count)
        whole = module(x, positions, segments)
        recorded = Recorded(lambda x, positions: (module(x, positions, torch.zeros_like(positions), cache),), [cache])
        for start in range(0, 8 * count, count):
            piece, at = x[:, start : start + count], positions[:, start : start + count]
            (out,) = recorded.again(piece, at) or (module(piece, at, torch.zeros_like(at), cache),)
            assert_close(out, whole[:, start : start + count], length=self.length)
            assert cache.lengths.tolist() == [start + count] * 2, "lengths say another number of tokens"

    @law(requires="cache", seed=seeds(), kills=[mutants.stores_more_than_it_declares])
    @torch.no_grad()
    def a_cache_holds_what_is_declared(self, config: Any, seed: int) -> None:
        """A token costs `cache_width` elements of the compute dtype, in `nbytes` and in memory."""
        module = self.built(config)
        cache = module.new_cache(2, _ROOM)
        assert cache.nbytes == 0, "an empty cache holds bytes"
        _step(module, self.x(2, 4, seed), cache, [0, 0])
        width = module.cache_width * self.dtype.itemsize
        assert cache.nbytes == 2 * 4 * width, f"{cache.nbytes} bytes for 8 tokens of {width}"
        # Memory is reserved for all places of both rows, or for the tokens there are: never for more.
        held = sum(t.numel() * t.element_size() for t in _tensors_of(cache) if t.is_floating_point())
        assert held <= 2 * _ROOM * width, f"{held} bytes of memory for at most {2 * _ROOM} tokens of {width}"
        cache.truncate(torch.tensor([1, 4]))
        assert cache.nbytes == 5 * width, "a truncated cache still counts what it forgot"


def _step(module: Attention, x: Tensor, cache: Cache, starts: Sequence[int]) -> Tensor:
    positions = torch.tensor(starts, device=x.device)[:, None] + torch.arange(x.shape[1], device=x.device)
    return module(x, positions, torch.zeros_like(positions), cache)


def _tensors_of(holder: object) -> list[Tensor]:
    """Return the tensors that a cache holds, also in lists and in objects of its own."""
    if isinstance(holder, Tensor):
        return [holder]
    inside = holder if isinstance(holder, list | tuple) else getattr(holder, "__dict__", {}).values()
    return [tensor for value in inside for tensor in _tensors_of(value)]

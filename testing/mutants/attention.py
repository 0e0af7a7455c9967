"""Attentions with one known fault each."""

from typing import Any

import torch
from torch import Tensor

from tangram.core.contracts import Cache
from tangram.testing.mutants.module import with_forward


def sees_the_future(attention: Any) -> Any:
    """A position sees a little of the next one."""
    forward = attention.forward

    def seeing(x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> Any:
        return forward(x + 1e-6 * x.roll(-1, 1), positions, segments, cache)

    return with_forward(attention, seeing)


def leaks_across_documents(attention: Any) -> Any:
    """Packed documents see each other: the segments are ignored, as `transformers` does when it keeps a cache."""
    forward = attention.forward

    def leaking(x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> Any:
        return forward(x, positions, torch.zeros_like(segments), cache)

    return with_forward(attention, leaking)


def mixes_rows(attention: Any) -> Any:
    """A row takes a little of the mean over the batch."""
    forward = attention.forward

    def mixing(x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> Any:
        return forward(x + 1e-6 * x.mean(0), positions, segments, cache)

    return with_forward(attention, mixing)


def restarts_positions_when_cached(attention: Any) -> Any:
    """Positions begin at zero with every piece that goes through the cache."""
    forward = attention.forward

    def restarting(x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> Any:
        start = positions if cache is None else positions - positions[:, :1]
        return forward(x, start, segments, cache)

    return with_forward(attention, restarting)


def drops_the_oldest_when_cached(attention: Any) -> Any:
    """The first token is forgotten once a second piece comes: only the lengths are right."""
    forward = attention.forward

    def dropping(x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> Any:
        first = cache is not None and int(cache.lengths.max()) == 0
        return forward(x * 0.5 if first else x, positions, segments, cache)

    return with_forward(attention, dropping)


def truncates_nothing(attention: Any) -> Any:
    """A truncated cache keeps what it should forget."""
    return _with_cache(attention, truncate=lambda cache, lengths: None)


def forks_the_first_row(attention: Any) -> Any:
    """Every sequence of a fork continues the first one."""
    return _with_cache(attention, fork=lambda cache, rows: cache.fork(torch.zeros_like(rows)))


def hands_over_the_first_row(attention: Any) -> Any:
    """Whatever sequence is handed over, it is the first one."""
    return _with_cache(attention, kept=lambda cache, row: cache.kept(0))


def looks_at_what_is_kept(attention: Any) -> Any:
    """Python takes the number of tokens from the cache, which says that it is steady."""
    forward = attention.forward

    def looking(x: Tensor, positions: Tensor, segments: Tensor, cache: Any = None) -> Any:
        return forward(x if cache is None else x * (1 + 1e-3 * cache.longest), positions, segments, cache)

    return with_forward(attention, looking)


def does_not_count_what_runs_again(attention: Any) -> Any:
    """A cache does not count the tokens that a forward appends when it runs again."""
    new_cache = attention.new_cache

    def uncounted(batch: int, length: int) -> Any:
        cache = new_cache(batch, length)
        cache.advance = lambda count: None
        return cache

    attention.new_cache = uncounted
    return attention


def stores_more_than_it_declares(attention: Any) -> Any:
    """The cache stores expanded keys and values while a latent is declared."""
    return _with_cache(attention, nbytes=lambda cache: 4 * cache.nbytes)


class _Broken:
    """A cache of which some methods are others."""

    def __init__(self, cache: Cache, **methods: Any) -> None:
        self._cache, self._methods = cache, methods

    def __getattr__(self, name: str) -> Any:
        if name == "nbytes" and "nbytes" in self._methods:
            return self._methods["nbytes"](self._cache)
        if name in self._methods:
            return lambda *args: self._methods[name](self._cache, *args)
        return getattr(self._cache, name)


def _with_cache(attention: Any, **methods: Any) -> Any:
    """Return the attention with caches of which some methods are others; inside it sees the real ones."""
    forward, new_cache = attention.forward, attention.new_cache

    def through(x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> Any:
        return forward(x, positions, segments, cache._cache if isinstance(cache, _Broken) else cache)

    attention.new_cache = lambda batch, length: _Broken(new_cache(batch, length), **methods)
    return with_forward(attention, through)

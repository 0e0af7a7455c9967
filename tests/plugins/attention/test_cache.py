"""The token cache by itself: what it refuses, and what stays when it refuses."""

import pytest
import torch

from tangram.plugins.attention.cache import BLOCK, TokenCache


def numbered(batch: int, length: int, start: int = 0) -> torch.Tensor:
    rows = torch.arange(start, start + batch * length, dtype=torch.float32)
    return rows.view(batch, length, 1).expand(batch, length, 2)


def empty(batch: int, length: int) -> TokenCache:
    return TokenCache.empty(batch, length, 2, torch.empty(0), torch.float32)


def taken(cache: TokenCache) -> int:
    """Return how many blocks somebody holds."""
    return sum(holders > 0 for holders in cache._pool.holders)


def test_each_sequence_grows_at_its_own_end():
    cache = empty(2, 5)
    cache.append(numbered(2, 3))
    cache.truncate(torch.tensor([1, 3]))
    entries, seen = cache.append(numbered(2, 2, start=10))
    assert cache.lengths.tolist() == [3, 5]
    assert entries[0, :3, 0].tolist() == [0, 10, 11]
    assert entries[1, :, 0].tolist() == [3, 4, 5, 12, 13]
    assert seen[0].tolist() == [[True, True, False, False, False], [True, True, True, False, False]]
    assert seen[1].tolist() == [[True] * 4 + [False], [True] * 5]


def test_outgrowing_names_both_lengths_and_changes_nothing():
    cache = empty(2, 3)
    cache.append(numbered(2, 2))
    with pytest.raises(ValueError, match="the cache holds 3 tokens and 4 are needed"):
        cache.append(numbered(2, 2, start=10))
    assert cache.lengths.tolist() == [2, 2]
    entries, _ = cache.append(numbered(2, 1, start=20))
    assert entries[..., 0].tolist() == [[0, 1, 20], [2, 3, 21]]


@pytest.mark.parametrize("lengths", [[1, 3], [3, 2], [-1, 0]])
def test_it_cannot_be_truncated_to_what_it_never_held(lengths):
    cache = empty(2, 4)
    cache.append(numbered(2, 2))
    with pytest.raises(ValueError, match=r"cannot truncate \[2, 2\] tokens to \["):
        cache.truncate(torch.tensor(lengths))
    assert cache.lengths.tolist() == [2, 2]


def test_it_does_not_hold_on_to_the_lengths_it_was_given():
    cache = empty(2, 4)
    cache.append(numbered(2, 2))
    lengths = torch.tensor([1, 2])
    cache.truncate(lengths)
    lengths.fill_(0)
    assert cache.lengths.tolist() == [1, 2]


def test_bytes_count_the_tokens_kept_and_not_the_room():
    cache = empty(2, 100)
    assert cache.nbytes == 0
    cache.append(numbered(2, 3))
    assert cache.nbytes == 6 * 2 * 4
    assert cache.fork(torch.tensor([0, 0, 1])).nbytes == 9 * 2 * 4


def test_a_fork_shares_blocks_until_one_of_the_two_writes():
    cache = empty(1, 4 * BLOCK)
    cache.append(numbered(1, BLOCK + 1))
    fork = cache.fork(torch.tensor([0, 0]))
    assert taken(cache) == 2
    fork.append(numbered(2, 1, start=900))
    assert taken(cache) == 4  # the last block of each, copied
    entries, _ = cache.append(numbered(1, 1, start=800))
    assert entries[0, -2:, 0].tolist() == [BLOCK, 800]
    assert fork.kept(1)[-2:, 0].tolist() == [BLOCK, 901]
    del fork
    assert taken(cache) == 2


def test_blocks_are_given_back():
    cache = empty(2, 3 * BLOCK)
    cache.append(numbered(2, 2 * BLOCK + 1))
    cache.truncate(torch.tensor([BLOCK, 0]))
    assert taken(cache) == 1
    cache = cache.fork(torch.tensor([1]))
    assert taken(cache) == 0


def test_a_sequence_taken_up_is_bounded_as_any():
    cache = empty(0, 4)
    with pytest.raises(ValueError, match="the cache holds 4 tokens and 5 are needed"):
        cache.admit(torch.zeros(5, 2))
    assert cache.lengths.tolist() == []

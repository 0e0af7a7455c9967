"""The cache that the attentions of this folder share: one row of values for each token, in blocks.

A pool hands out blocks of 64 tokens. A sequence is a list of blocks; a fork shares its blocks, and whoever writes into
a shared one first takes a copy. Blocks come in a row where they are free, so that the tokens of a sequence mostly lie
side by side and are read where they are.
"""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tangram.kernels import append_entries

BLOCK = 64
"""Tokens of a block."""


class _Pool:
    """Blocks of entries [blocks, BLOCK, width], each with the number of sequences that hold it."""

    def __init__(self, blocks: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, because what no one wrote is multiplied by a share of zero, which a nan would survive.
        self.entries = torch.zeros(blocks, BLOCK, width, dtype=dtype, device=device)
        self.holders = [0] * blocks
        self.free = set(range(blocks))

    def take(self, wanted: int) -> int:
        """Return a free block, number `wanted` if it is one."""
        if not self.free:
            more = max(len(self.holders), 1)
            self.entries = torch.cat([self.entries, self.entries.new_zeros(more, *self.entries.shape[1:])])
            self.free.update(range(len(self.holders), len(self.holders) + more))
            self.holders += [0] * more
        block = wanted if wanted in self.free else min(self.free)
        self.free.remove(block)
        self.holders[block] = 1
        return block

    def hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free.add(block)


def _release_all(pool: _Pool, rows: list[list[int]]) -> None:
    for blocks in rows:
        pool.release(blocks)


class TokenCache:
    """Keeps `width` values for each token of B sequences."""

    def __init__(
        self, pool: _Pool, limit: int, rows: list[list[int]], counts: list[int], steady: Callable[[int, int], bool]
    ) -> None:
        self._pool, self._limit, self._steady = pool, limit, steady
        self._rows, self._counts = rows, counts  # of each sequence its blocks, and its tokens
        device, most = pool.entries.device, -(-limit // BLOCK)
        table = [blocks + [0] * (most - len(blocks)) for blocks in rows]
        self._table = torch.tensor(table, dtype=torch.int32, device=device).view(len(rows), most)
        self._ends = torch.tensor(counts, dtype=torch.int64, device=device)
        weakref.finalize(self, _release_all, pool, rows)

    @classmethod
    def empty(
        cls,
        batch: int,
        length: int,
        width: int,
        like: Tensor,
        dtype: torch.dtype,
        steady: Callable[[int, int], bool] = lambda count, before: False,
    ) -> "TokenCache":
        """Return an empty cache for `batch` sequences of at most `length` tokens, on the device of `like`.

        `steady` says whether a forward of `count` tokens after `before` others may be recorded.
        """
        pool = _Pool(batch * -(-length // BLOCK), width, dtype, like.device)
        return cls(pool, length, [[] for _ in range(batch)], [0] * batch, steady)

    @property
    def lengths(self) -> Tensor:
        """Tokens kept of each sequence, int64 [B]."""
        return torch.tensor(self._counts, dtype=torch.int64, device=self._pool.entries.device)

    @property
    def longest(self) -> int:
        """Tokens kept of the longest sequence."""
        return max(self._counts, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes held by the tokens kept."""
        return sum(self._counts) * self._pool.entries.shape[2] * self._pool.entries.element_size()

    @property
    def blocks(self) -> Tensor:
        """The blocks of all sequences, [blocks, BLOCK, width]."""
        return self._pool.entries

    @property
    def table(self) -> Tensor:
        """Which blocks hold a sequence, in order, int32 [B, most blocks of a sequence]; it changes with the cache."""
        return self._table

    @property
    def ends(self) -> Tensor:
        """Tokens kept of each sequence, int64 [B]; unlike `lengths` it changes with the cache."""
        return self._ends

    def steady(self, count: int) -> bool:
        """Return whether a forward of `count` more tokens of each sequence may be recorded."""
        return bool(self._counts) and self._steady(count, self.longest)

    def reserve(self, count: int) -> Tensor:
        """Make room for `count` more tokens of each sequence; return the memory in which all tokens are.

        As long as that is the same tensor, `store` of so many tokens is the same operations.

        Raises:
            ValueError: A sequence outgrows the cache, which then stays as it was.
        """
        needed = self.longest + count
        if needed > self._limit:
            raise ValueError(f"the cache holds {self._limit} tokens and {needed} are needed")
        for row in range(len(self._rows)):
            self._make_room(row, count)
        return self._pool.entries

    def advance(self, count: int) -> None:
        """Count `count` more tokens of each sequence, which operations of an earlier `store` have written again."""
        self._counts = [before + count for before in self._counts]

    def store(self, values: Tensor) -> None:
        """Append values [B, S, width].

        Raises:
            ValueError: A sequence outgrows the cache, which then stays as it was.
        """
        count = values.shape[1]
        append_entries(values, self.reserve(count), self._table, self._ends)
        self.advance(count)

    def append(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append values [B, S, width]; return all entries [B, L, width] and which of them each query sees.

        The second value is bool [B, S, L]: of an entry of the same sequence no later than the query.

        Raises:
            ValueError: A sequence outgrows the cache.
        """
        self.store(values)
        count = values.shape[1]
        longest = self.longest
        places = self.lengths[:, None] - count + torch.arange(count, device=values.device)  # [B, S]
        seen = torch.arange(longest, device=values.device) <= places[:, :, None]
        rows = [self._entries(row, longest) for row in range(len(self._rows))]
        if not rows:
            return values.new_zeros(0, longest, values.shape[2]), seen
        return (rows[0][None] if len(rows) == 1 else torch.stack(rows)), seen

    def truncate(self, lengths: Tensor) -> None:
        """Forget all but the first `lengths` [B] tokens of each sequence.

        Raises:
            ValueError: A length is beyond what is kept.
        """
        wanted = lengths.tolist()
        if any(not 0 <= new <= old for new, old in zip(wanted, self._counts, strict=True)):
            raise ValueError(f"cannot truncate {self._counts} tokens to {wanted}")
        self._counts = wanted
        self._ends.copy_(lengths)
        for blocks, count in zip(self._rows, wanted, strict=True):
            kept = -(-count // BLOCK)
            if kept < len(blocks):
                self._pool.release(blocks[kept:])
                del blocks[kept:]

    def fork(self, rows: Tensor) -> "TokenCache":
        """Return a cache whose sequence i continues sequence `rows[i]` of this one, in the same blocks."""
        wanted = rows.tolist()
        shared = [list(self._rows[row]) for row in wanted]
        for blocks in shared:
            self._pool.hold(blocks)
        return TokenCache(self._pool, self._limit, shared, [self._counts[row] for row in wanted], self._steady)

    def kept(self, row: int) -> Tensor:
        """Return what is kept of a sequence, [T, width]."""
        return self._entries(row, self._counts[row])

    def admit(self, entries: Tensor) -> None:
        """Take up one more sequence, of which `kept` returned the entries [T, width].

        Raises:
            ValueError: It is longer than this cache's sequences may be.
        """
        if len(entries) > self._limit:
            raise ValueError(f"the cache holds {self._limit} tokens and {len(entries)} are needed")
        row, count = len(self._rows), len(entries)
        self._rows.append([])
        self._counts.append(0)
        self._table = torch.cat([self._table, self._table.new_zeros(1, self._table.shape[1])])
        self._ends = torch.cat([self._ends, self._ends.new_zeros(1)])
        self._make_room(row, count)
        append_entries(entries[None], self._pool.entries, self._table[row:], self._ends[row:])
        self._counts[row] = count

    def _make_room(self, row: int, count: int) -> None:
        """See to it that the next `count` tokens of a sequence have blocks that no other one reads."""
        blocks, at = self._rows[row], self._counts[row]
        changed = False
        for place in range(at // BLOCK, len(blocks)):
            shared = blocks[place]
            if self._pool.holders[shared] > 1:
                blocks[place] = self._pool.take(shared + 1)
                self._pool.entries[blocks[place]] = self._pool.entries[shared]
                self._pool.release([shared])
                changed = True
        while len(blocks) * BLOCK < at + count:
            first = row * -(-self._limit // BLOCK)  # each sequence begins where there is room behind it
            blocks.append(self._pool.take(blocks[-1] + 1 if blocks else first))
            changed = True
        if changed:
            self._table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def _entries(self, row: int, length: int) -> Tensor:
        """Return `length` entries from the beginning of a sequence, [length, width]; behind its last one anything."""
        blocks, flat = self._rows[row], self._pool.entries.flatten(0, 1)
        if not blocks:
            return flat.new_zeros(length, flat.shape[1])
        start = blocks[0] * BLOCK
        if blocks[-1] - blocks[0] + 1 == len(blocks) and blocks == list(range(blocks[0], blocks[-1] + 1)):
            found = flat[start : start + length]
            if len(found) == length:
                return found
        places = torch.arange(length, device=flat.device)
        places = torch.clamp(places, max=len(blocks) * BLOCK - 1)
        index = torch.tensor(blocks, device=flat.device)[places // BLOCK] * BLOCK + places % BLOCK
        return flat[index]

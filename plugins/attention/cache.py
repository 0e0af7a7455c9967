"""The cache that the attentions of this folder share: one row of values for each token."""

import torch
from torch import Tensor


class TokenCache:
    """Keeps `width` values for each token of B sequences, in a buffer of fixed length."""

    def __init__(self, entries: Tensor, lengths: Tensor) -> None:
        self.entries, self.lengths = entries, lengths  # [B, L, width], int64 [B]

    @classmethod
    def empty(cls, batch: int, length: int, width: int, like: Tensor, dtype: torch.dtype) -> "TokenCache":
        """Return an empty cache on the device of `like`."""
        entries = torch.zeros(batch, length, width, dtype=dtype, device=like.device)
        return cls(entries, torch.zeros(batch, dtype=torch.int64, device=like.device))

    @property
    def nbytes(self) -> int:
        """Bytes held by the tokens kept."""
        return int(self.lengths.sum()) * self.entries.shape[2] * self.entries.element_size()

    def append(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append values [B, S, width]; return all entries [B, L, width] and which of them each query sees.

        The second value is bool [B, S, L]: of an entry of the same sequence no later than the query.

        Raises:
            ValueError: A sequence outgrows the cache.
        """
        batch, count, _ = values.shape
        places = self.lengths[:, None] + torch.arange(count, device=values.device)  # [B, S]
        used = int(places[:, -1].max()) + 1
        if used > self.entries.shape[1]:
            raise ValueError(f"the cache holds {self.entries.shape[1]} tokens and {used} are needed")
        self.entries[torch.arange(batch, device=values.device)[:, None], places] = values
        self.lengths = places[:, -1] + 1
        seen = torch.arange(used, device=values.device) <= places[:, :, None]
        return self.entries[:, :used], seen

    def truncate(self, lengths: Tensor) -> None:
        """Forget all but the first `lengths` [B] tokens of each sequence.

        Raises:
            ValueError: A length is beyond what is kept.
        """
        if bool((lengths > self.lengths).any()) or bool((lengths < 0).any()):
            raise ValueError(f"cannot truncate {self.lengths.tolist()} tokens to {lengths.tolist()}")
        self.lengths = lengths.clone()

    def fork(self, rows: Tensor) -> "TokenCache":
        """Return a cache whose sequence i continues sequence `rows[i]` of this one."""
        return TokenCache(self.entries[rows], self.lengths[rows])

"""Sliding-window attention (arXiv:2004.05150, section 3.1): a token sees itself and the few tokens before it.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j      over i - window < j <= i with segment_j = segment_i

After n layers a token has seen n * (window - 1) others. Queries are worked in blocks of `window`, each over its own
keys and those of the block before: memory and time grow with S * window, not with S * S.
"""

import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor
from torch.nn.functional import pad

from tangram.core import component
from tangram.core.context import Context
from tangram.core.contracts import Attention, Cache
from tangram.kernels import frequencies, masked_attention, rotate, rotation
from tangram.plugins.attention.cache import TokenCache

_NOWHERE = -1
"""The segment of what only fills a block up."""


@component("attention", use="sliding_window", capabilities=["cache"])
@frozen(kw_only=True)
class SlidingWindowConfig:
    """Attention in which a token sees itself and at most `window` - 1 tokens before it (arXiv:2004.05150).

    Attributes:
        n_heads: Heads H.
        head_dim: Width of a head; even, for its halves are rotated.
        window: Tokens that a token sees, itself included.
        theta: Base of the rotary frequencies.
    """

    n_heads: int = field(validator=gt(0))
    head_dim: int = field(validator=gt(0))
    window: int = field(validator=gt(0))
    theta: float = field(default=10000.0, validator=gt(0.0))

    def __attrs_post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")

    def build(self, ctx: Context) -> Attention:
        """Build it."""
        return SlidingWindow(self, ctx)


class SlidingWindow(Attention):
    """Attention within a window. Its cache keeps every token, so that any number of them can be taken back."""

    def __init__(self, config: SlidingWindowConfig, ctx: Context) -> None:
        super().__init__()
        self.config, self.compute = config, ctx.precision.compute
        self.width = config.n_heads * config.head_dim
        self.qkv = ctx.linear(ctx.dim, 3 * self.width)
        self.out = ctx.linear(self.width, ctx.dim, input="attention")
        self.scale = config.head_dim**-0.5

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the output [B, S, D]; with a cache, x continues what the cache holds."""
        table = frequencies(self.config.head_dim, self.config.theta, device=x.device)
        cos, sin = rotation(positions, table, x.dtype)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.config.n_heads, -1)).unbind(2)  # [B, S, H, head] each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None:
            out = windowed_attention(q, k, v, self.scale, segments, self.config.window)
        else:
            assert isinstance(cache, TokenCache)
            entries, seen = cache.append(torch.cat([k, v], 2).flatten(2))
            k, v = entries.unflatten(-1, (2, self.config.n_heads, -1)).unbind(2)
            before = seen.sum(-1, keepdim=True) - self.config.window  # [B, S, 1]: keys that have left the window
            near = torch.arange(k.shape[1], device=x.device) >= before
            out = masked_attention(q, k, v, self.scale, seen & near)
        return self.out(out.flatten(2))  # type: ignore[no-any-return]

    @property
    def cache_width(self) -> int:
        """Elements that the cache keeps for each token: a key and a value for each head."""
        return 2 * self.width

    def new_cache(self, batch: int, length: int) -> Cache:
        """Return an empty cache for `batch` sequences of at most `length` tokens."""
        return TokenCache.empty(batch, length, self.cache_width, next(self.parameters()), self.compute)

    def core_flops(self, context: int) -> int:
        """Return the operations of scores and weighted values for one token that `context` tokens lead to."""
        return 4 * min(context, self.config.window) * self.width


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Tensor, window: int) -> Tensor:
    """Return the output [B, S, H, Dv] of queries [B, S, H, Dk] over the last `window` tokens of their segments.

    Args:
        q: Queries [B, S, H, Dk].
        k: Keys [B, S, H, Dk].
        v: Values [B, S, H, Dv].
        scale: Multiplies the scores.
        segments: Document numbers, not negative, int64 [B, S].
        window: Tokens that a token sees, itself included.
    """
    batch, length = segments.shape
    size = min(window, length)
    q, k, v = (_blocks(t, size, 0) for t in (q, k, v))  # [B, blocks, size, H, D]
    numbers = _blocks(segments, size, _NOWHERE)  # [B, blocks, size]
    k, v, keys = _with_block_before(k, 0), _with_block_before(v, 0), _with_block_before(numbers, _NOWHERE)
    query, key = torch.arange(size, device=q.device)[:, None] + size, torch.arange(2 * size, device=q.device)
    near = (key <= query) & (key > query - window)  # [size, 2 size]
    seen = near & (numbers[..., None] == keys[..., None, :])  # what fills up sees itself, and nothing else sees it
    out = masked_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale, seen.flatten(0, 1))
    return out.reshape(batch, -1, *out.shape[2:])[:, :length]


def _blocks(x: Tensor, size: int, fill: int) -> Tensor:
    """Return x [B, S, ...] in blocks [B, blocks, size, ...], the last one filled up."""
    filled = pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % size), value=fill)
    return filled.reshape(len(x), -1, size, *x.shape[2:])


def _with_block_before(x: Tensor, fill: int) -> Tensor:
    """Return each of the blocks x [B, blocks, size, ...] behind the one before it, [B, blocks, 2 size, ...]."""
    before = pad(x, (0, 0) * (x.ndim - 2) + (1, 0), value=fill)[:, :-1]
    return torch.cat([before, x], 2)

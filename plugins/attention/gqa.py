"""Grouped-query attention (arXiv:2305.13245), with rotary positions; the plain attention to compare with."""

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, optional
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Attention, Cache
from tangram.core.registry import component
from tangram.kernels import causal_attention, frequencies, masked_attention, rotate, rotation
from tangram.plugins.attention.cache import TokenCache


@component("attention", use="gqa", capabilities=["cache"])
@frozen(kw_only=True)
class GQAConfig:
    """Attention in which groups of query heads share one head of keys and values.

    Attributes:
        n_heads: Query heads H.
        n_kv_heads: Heads of keys and values; null for as many as query heads (MHA), 1 for MQA.
        head_dim: Width of a head.
        theta: Base of the rotary frequencies.
    """

    n_heads: int = field(validator=gt(0))
    n_kv_heads: int | None = field(default=None, validator=optional(gt(0)))
    head_dim: int = field(validator=gt(0))
    theta: float = field(default=10000.0, validator=ge(1.0))

    def __attrs_post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")

    def build(self, ctx: Context) -> Attention:
        """Build it."""
        return GQA(self, ctx)


class GQA(Attention):
    """Grouped-query attention."""

    def __init__(self, config: GQAConfig, ctx: Context) -> None:
        super().__init__()
        self.config, self.compute = config, ctx.precision.compute
        self.n_kv_heads = config.n_heads if config.n_kv_heads is None else config.n_kv_heads
        self.q = ctx.linear(ctx.dim, config.n_heads * config.head_dim)
        self.kv = ctx.linear(ctx.dim, 2 * self.n_kv_heads * config.head_dim)
        self.out = ctx.linear(config.n_heads * config.head_dim, ctx.dim, input="attention")
        self.scale = config.head_dim**-0.5

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the output [B, S, D]; with a cache, x continues what the cache holds."""
        table = frequencies(self.config.head_dim, self.config.theta, device=x.device)
        cos, sin = rotation(positions, table, x.dtype)
        q = rotate(self.q(x).unflatten(-1, (self.config.n_heads, -1)), cos, sin)  # [B, S, H, head]
        k, v = self.kv(x).unflatten(-1, (2, self.n_kv_heads, -1)).unbind(2)  # [B, S, kv heads, head] each
        k = rotate(k, cos, sin)
        if cache is None:
            out = causal_attention(q, self._for_all(k), self._for_all(v), self.scale, segments)
        else:
            assert isinstance(cache, TokenCache)
            entries, seen = cache.append(torch.cat([k.flatten(2), v.flatten(2)], -1))
            k, v = entries.unflatten(-1, (2, self.n_kv_heads, -1)).unbind(2)
            out = masked_attention(q, self._for_all(k), self._for_all(v), self.scale, seen)
        return self.out(out.flatten(2))  # type: ignore[no-any-return]

    def _for_all(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.config.n_heads // self.n_kv_heads, 2)

    @property
    def cache_width(self) -> int:
        """Elements that the cache keeps for each token: a key and a value for each of their heads."""
        return 2 * self.n_kv_heads * self.config.head_dim

    def new_cache(self, batch: int, length: int) -> TokenCache:
        """Return an empty cache for `batch` sequences of at most `length` tokens."""
        like = next(self.parameters())
        return TokenCache.empty(batch, length, self.cache_width, like, self.compute)

    def core_flops(self, context: int) -> int:
        """Return the operations of scores and weighted values for one token that sees `context` others."""
        return 4 * context * self.config.n_heads * self.config.head_dim

"""Multi-head latent attention (arXiv:2412.19437, section 2.1.1, equations 1 to 11).

From a cache there are two ways to the same numbers. Expanded, keys and values are made again from the latents of all
L tokens, as training makes them; absorbed, W^UK is multiplied into the S queries and W^UV into what they take, and
they attend to the latents themselves. Whichever takes fewer operations is taken: the first for a long prompt, the
second for the few tokens of decoding.
"""

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, optional
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Attention, Cache
from tangram.core.layers import norm
from tangram.core.registry import component
from tangram.kernels import (
    Yarn,
    absorb,
    causal_attention,
    expand,
    frequencies,
    masked_attention,
    mla_decode,
    rotate,
    rotation,
)
from tangram.plugins.attention.cache import TokenCache


@frozen(kw_only=True)
class YarnConfig:
    """Stretch the rotary frequencies to longer contexts (arXiv:2309.00071).

    Attributes:
        factor: How many times longer.
        original_length: Context that the model was trained on.
        beta_fast: Rotations over the original length above which a frequency stays.
        beta_slow: Rotations below which it is divided by `factor`.
        mscale: Strength of the correction of the softmax scale.
    """

    factor: float = field(validator=gt(1.0))
    original_length: int = field(validator=gt(0))
    beta_fast: float = field(default=32.0, validator=gt(0.0))
    beta_slow: float = field(default=1.0, validator=gt(0.0))
    mscale: float = field(default=1.0, validator=ge(0.0))


@component("attention", use="mla", capabilities=["cache"])
@frozen(kw_only=True)
class MLAConfig:
    """Attention whose keys and values are made from one small latent a token, which is all the cache keeps.

    Attributes:
        n_heads: Heads H.
        q_rank: Width of the query latent; null makes queries directly.
        kv_rank: Width C of the latent of keys and values.
        nope_dim: Width of a head's part without position.
        rope_dim: Width of a head's rotary part; its key is shared by all heads.
        value_dim: Width of a head's value.
        theta: Base of the rotary frequencies.
        yarn: Stretch to longer contexts; null for none.
    """

    n_heads: int = field(validator=gt(0))
    q_rank: int | None = field(default=None, validator=optional(gt(0)))
    kv_rank: int = field(validator=gt(0))
    nope_dim: int = field(validator=gt(0))
    rope_dim: int = field(validator=gt(0))
    value_dim: int = field(validator=gt(0))
    theta: float = field(default=10000.0, validator=ge(1.0))
    yarn: YarnConfig | None = None

    def __attrs_post_init__(self) -> None:
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim must be even, got {self.rope_dim}")

    def build(self, ctx: Context) -> Attention:
        """Build it."""
        return MLA(self, ctx)


class MLA(Attention):
    """Multi-head latent attention, keys and values expanded for the tokens at hand."""

    def __init__(self, config: MLAConfig, ctx: Context) -> None:
        super().__init__()
        self.config, self.recompute, self.compute = config, ctx.recompute, ctx.precision.compute
        heads, c = config.n_heads, config
        if c.q_rank is None:
            self.q_up = ctx.linear(ctx.dim, heads * (c.nope_dim + c.rope_dim))
        else:
            self.q_down = ctx.linear(ctx.dim, c.q_rank)
            self.q_norm = norm(ctx, c.q_rank)
            self.q_up = ctx.linear(c.q_rank, heads * (c.nope_dim + c.rope_dim))
        self.kv_down = ctx.linear(ctx.dim, c.kv_rank + c.rope_dim)
        self.kv_norm = norm(ctx, c.kv_rank)
        self.kv_up = ctx.linear(c.kv_rank, heads * (c.nope_dim + c.value_dim))
        self.out = ctx.linear(heads * c.value_dim, ctx.dim, input="attention")
        self.scale = (c.nope_dim + c.rope_dim) ** -0.5
        self.yarn = None
        if c.yarn is not None:
            y = c.yarn
            self.yarn = Yarn(y.factor, y.original_length, y.beta_fast, y.beta_slow, y.mscale)
            # The correction multiplies the whole score, the part without position too.
            self.scale *= self.yarn.softmax_correction

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the output [B, S, D]; with a cache, x continues what the cache holds."""
        table = frequencies(self.config.rope_dim, self.config.theta, self.yarn, device=x.device)
        cos, sin = rotation(positions, table, x.dtype)  # [B, S, rope / 2]
        q = self.recompute(self._queries, self._query_input(x), cos, sin)  # [B, S, H, nope + rope]
        latent, shared_key = self.kv_down(x).split([self.config.kv_rank, self.config.rope_dim], -1)
        latent = self.recompute(self.kv_norm, latent)
        shared_key = rotate(shared_key[:, :, None], cos, sin)[:, :, 0]  # equation 3: one key for all heads
        if cache is None:
            k, v = self._keys_and_values(latent, shared_key)
            out = causal_attention(q, k, v, self.scale, segments)
        else:
            assert isinstance(cache, TokenCache)
            entries = torch.cat([latent, shared_key], -1)
            differentiated = torch.is_grad_enabled() and q.requires_grad
            if not differentiated and self._absorbs(q.shape[1], cache.longest):
                out = self._absorbed(q, entries, cache)
            elif cache.longest:
                out = self._expanded(q, entries, cache)
            else:  # a text begins: as without a cache
                cache.store(entries)
                out = causal_attention(q, *self._keys_and_values(latent, shared_key), self.scale, segments)
        return self.out(out.flatten(2))  # type: ignore[no-any-return]

    def _absorbs(self, tokens: int, before: int) -> bool:
        """Return whether, after so many others, the absorbed way takes fewer operations; then it does after more."""
        c, length = self.config, before + tokens
        absorbed = tokens * (length * (2 * c.kv_rank + c.rope_dim) + c.kv_rank * (c.nope_dim + c.value_dim))
        head = c.nope_dim + c.value_dim
        return absorbed < length * c.kv_rank * head + tokens * length * (head + c.rope_dim)

    def _expanded(self, q: Tensor, entries: Tensor, cache: TokenCache) -> Tensor:
        kept, seen = cache.append(entries)
        k, v = self._keys_and_values(*kept.split([self.config.kv_rank, self.config.rope_dim], -1))
        return masked_attention(q, k, v, self.scale, seen)

    def _absorbed(self, q: Tensor, entries: Tensor, cache: TokenCache) -> Tensor:
        cache.store(entries)
        c = self.config
        weight = self.kv_up.get_parameter("weight").to(q.dtype)
        w_k, w_v = weight.view(c.n_heads, -1, c.kv_rank).split([c.nope_dim, c.value_dim], 1)  # [H, nope | value, C]
        # W^UK multiplied into the query instead of the latents, and W^UV into their mean (section 2.1.1).
        means = mla_decode(absorb(q, w_k), cache.blocks, cache.table, cache.ends, self.scale, c.kv_rank)
        return expand(means, w_v)

    def _query_input(self, x: Tensor) -> Tensor:
        if self.config.q_rank is None:
            return x
        return self.recompute(self.q_norm, self.q_down(x))  # c^Q of equation 6

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.q_up(x).unflatten(-1, (self.config.n_heads, -1))
        nope, turned = q.split([self.config.nope_dim, self.config.rope_dim], -1)
        return torch.cat([nope, rotate(turned, cos, sin)], -1)  # equations 7 to 9

    def _keys_and_values(self, latent: Tensor, shared_key: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.recompute(self.kv_up, latent).unflatten(-1, (self.config.n_heads, -1))
        nope, v = kv.split([self.config.nope_dim, self.config.value_dim], -1)
        return self.recompute(_with_shared_key, nope, shared_key), v  # equations 2, 4 and 5

    @property
    def cache_width(self) -> int:
        """Elements that the cache keeps for each token: the latent and the shared key."""
        return self.config.kv_rank + self.config.rope_dim

    def new_cache(self, batch: int, length: int) -> TokenCache:
        """Return an empty cache for `batch` sequences of at most `length` tokens."""
        return TokenCache.empty(
            batch, length, self.cache_width, self.kv_norm.weight, self.compute, steady=self._absorbs
        )

    def core_flops(self, context: int) -> int:
        """Return the operations of scores and weighted values for one token that sees `context` others."""
        c = self.config
        return 2 * context * c.n_heads * (c.nope_dim + c.rope_dim + c.value_dim)


def _with_shared_key(nope: Tensor, shared_key: Tensor) -> Tensor:
    return torch.cat([nope, shared_key[:, :, None].expand(*nope.shape[:3], -1)], -1)

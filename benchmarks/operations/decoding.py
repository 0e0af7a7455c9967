"""Cases of mla_decode: one new token of every sequence over the latent cache."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from operations.case import Case, Peer, near
from operations.scale import Scale
from tangram.kernels import accumulator, mla_decode

_BLOCK = 64
"""Entries of a block, as the caches of `plugins/attention` have them."""


def cases(scale: Scale) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield one for each number of heads."""
    for heads in scale.decode_heads:
        yield "mla_decode", partial(_case, scale, heads)


def _case(scale: Scale, heads: int) -> Case:
    rank, width = scale.latent, scale.latent + scale.rope_dim
    softmax_scale = (128 + scale.rope_dim) ** -0.5  # by the width of a head before its queries were absorbed
    lengths = torch.full((scale.sequences,), scale.context, device=scale.device)
    table = torch.arange(scale.sequences * scale.context // _BLOCK, dtype=torch.int32, device=scale.device)
    table = table.view(scale.sequences, -1)

    def ours(q: Tensor, cache: Tensor) -> Tensor:
        blocks = cache.view(-1, _BLOCK, width)
        return mla_decode(q[:, None], blocks, table, lengths, softmax_scale, rank)[:, 0]

    def formula(q: Tensor, cache: Tensor) -> Tensor:
        scores = q @ cache.mT * softmax_scale
        return scores.softmax(-1, dtype=accumulator(q.dtype)).to(q.dtype) @ cache[..., :rank]

    def library(q: Tensor, cache: Tensor) -> Tensor:
        entries = cache[:, None]
        out = F.scaled_dot_product_attention(q[:, None], entries, entries[..., :rank], scale=softmax_scale)
        return out[:, 0]

    return Case(
        operation="mla_decode",
        shape=f"{scale.sequences} x {heads} heads, {scale.context} entries of {width}",
        inputs=(scale.draw(scale.sequences, heads, width), scale.draw(scale.sequences, scale.context, width)),
        ours=ours,
        formula=formula,
        check=near(width + scale.context, coarse=2),
        flops=2.0 * scale.sequences * heads * scale.context * (width + rank),
        peers={"F.scaled_dot_product_attention": Peer(lambda: library)},
    )

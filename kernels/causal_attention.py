"""Softmax attention in which a token sees itself and what came before it in its segment.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over j <= i with segment_j = segment_i

On a CPU a product in blocks that skips most of the upper triangle is 1.4 to 1.9 times as fast as
`scaled_dot_product_attention` at every length that was measured, but it keeps its probabilities for backward: so it
runs up to `BLOCKED` positions, and the library's kernel, which keeps none, beyond. The library's values are padded to
the width of the keys: with other widths it falls back to a path two to three times slower, without a word. Documents
are worked one by one instead of under a dense mask.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tangram.kernels.products import product_dtype, runs_on_cpu

BLOCKED = 1024
"""Longest sequence that takes the product in blocks and keeps 2 MiB a head: see benchmarks/attention_cpu.py."""

_BLOCK = 64
"""Queries of one block."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Tensor) -> Tensor:
    """Return the attention output [B, S, H, Dv].

    Args:
        q: Queries [B, S, H, Dk].
        k: Keys [B, S, H, Dk].
        v: Values [B, S, H, Dv].
        scale: Multiplies the scores.
        segments: Document numbers, not decreasing along S, int64 [B, S]. A GPU is asked for them, which takes its
            time, unless they are one number that was expanded.
    """
    # A tensor without memory says nothing of documents, and counts as one.
    if q.is_meta or not any(segments.stride()) or bool((segments[:, 0] == segments[:, -1]).all()):
        return _whole(q, k, v, scale)
    rows = []
    for row, numbers in enumerate(segments):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        qs, ks, vs = (t[row, None].split(lengths, dim=1) for t in (q, k, v))
        documents = [_whole(*document, scale) for document in zip(qs, ks, vs, strict=True)]
        rows.append(torch.cat(documents, dim=1))
    return torch.cat(rows)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Return the attention output [B, S, H, Dv] of queries [B, S, H, Dk] over keys [B, L, H, Dk] they see.

    Args:
        q: Queries [B, S, H, Dk].
        k: Keys [B, L, H, Dk].
        v: Values [B, L, H, Dv].
        scale: Multiplies the scores.
        seen: Which keys each query sees, bool [B, S, L], at least one.
    """
    scores = torch.einsum("bshd,blhd->bhsl", q * scale, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1).to(v.dtype), v)


def _whole(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if runs_on_cpu(q) and q.shape[1] <= BLOCKED:
        wide = product_dtype(q)
        blocked: Tensor = _Blocked.apply(q.to(wide), k.to(wide), v.to(wide), scale)
        return blocked.to(v.dtype)
    padded = F.pad(v, (0, max(0, q.shape[-1] - v.shape[-1])))
    heads_first = q.transpose(1, 2), k.transpose(1, 2), padded.transpose(1, 2)
    if q.is_meta:
        # Without memory the library would take the one of its kernels that keeps all probabilities.
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, is_causal=True, scale=scale)[0]
    else:
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)
    return out.transpose(1, 2)[..., : v.shape[-1]]


def _spans(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK)]


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)  # [B, S, H, D] -> [B * H, S, D]


class _Blocked(torch.autograd.Function):
    # Queries go in blocks, each against its own prefix of the keys. The backward is written out because autograd
    # would pad every slice's gradient with zeros and add.
    @staticmethod
    def forward(ctx, q, k, v, scale):
        shape = q.shape[0], q.shape[2]
        # The arguments are saved, not their copies: a caller may know how to make them again.
        saved = q, k, v
        q, k, v = _heads_first(q * scale), _heads_first(k), _heads_first(v)
        out = torch.empty_like(v)
        probabilities = []
        for start, stop in _spans(q.shape[1]):
            scores = torch.bmm(q[:, start:stop], k[:, :stop].transpose(1, 2))
            above = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu_(1)
            scores[:, :, start:].masked_fill_(above, -torch.inf)
            chosen = scores.softmax(-1)
            torch.bmm(chosen, v[:, :stop], out=out[:, start:stop])
            probabilities.append(chosen)
        ctx.save_for_backward(*saved, *probabilities)
        ctx.shape, ctx.scale = shape, scale
        return out.unflatten(0, shape).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *probabilities = ctx.saved_tensors
        q, k, v, grad = _heads_first(q * ctx.scale), _heads_first(k), _heads_first(v), _heads_first(grad)
        q_grad, k_grad, v_grad = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, stop), chosen in zip(_spans(q.shape[1]), probabilities, strict=True):
            g = grad[:, start:stop]
            v_grad[:, :stop].baddbmm_(chosen.transpose(1, 2), g)
            scores_grad = torch._softmax_backward_data(
                torch.bmm(g, v[:, :stop].transpose(1, 2)), chosen, -1, chosen.dtype
            )
            torch.bmm(scores_grad, k[:, :stop], out=q_grad[:, start:stop])
            k_grad[:, :stop].baddbmm_(scores_grad.transpose(1, 2), q[:, start:stop])
        q_grad *= ctx.scale
        return *(t.unflatten(0, ctx.shape).transpose(1, 2) for t in (q_grad, k_grad, v_grad)), None

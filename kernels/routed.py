"""What a router does with affinities: the choice of experts, and what is counted of it.

With s the affinities of a token and b the expert biases, the K experts with the largest s + b are chosen among those of
the best groups, a group being as good as the sum of its two largest. The gates are s of the chosen, over their sum
(arXiv:2412.19437, equations 13 to 20).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tangram.kernels import few_rows


class Weighed(NamedTuple):
    """What a choice comes to.

    Attributes:
        gates: Weights of the chosen experts, with gradient, [B, S, K].
        load: How often each was chosen, int64 [B, E].
        top: How often each stands among the K largest affinities, int64 [B, E] (equation 18).
        mean: Affinities normalised over all experts, their mean over the sequence, with gradient, [B, E]
            (equations 19 and 20).
    """

    gates: Tensor
    load: Tensor
    top: Tensor
    mean: Tensor


@torch.no_grad()
def choose(biased: Tensor, top_k: int, n_groups: int = 1, top_groups: int = 1) -> Tensor:
    """Return the chosen experts, distinct, int64 [B, S, K], of biased affinities [B, S, E]."""
    if few_rows.takes(biased, biased.shape[0] * biased.shape[1]):
        return few_rows.choose(biased, top_k, n_groups, top_groups)
    if top_groups < n_groups:
        groups = biased.unflatten(-1, (n_groups, -1))  # [B, S, G, E / G]
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        kept = best.topk(top_groups, dim=-1, sorted=False).indices
        dropped = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
        # Zero instead of -inf would let an expert of a dropped group win wherever all scores are negative.
        biased = groups.masked_fill(dropped[..., None], -torch.inf).flatten(-2)
    return biased.topk(top_k, dim=-1, sorted=False).indices


def weigh(affinity: Tensor, ids: Tensor, scale: float, normalise: bool) -> Weighed:
    """Return the gates of a choice, from the unbiased affinities, and what is counted of it.

    Args:
        affinity: Affinities [B, S, E].
        ids: Chosen experts, int64 [B, S, K].
        scale: Multiplies the gates.
        normalise: Divide the gates of a token by their sum first (equation 13).
    """
    if few_rows.takes(affinity, affinity.shape[0] * affinity.shape[1]):
        return Weighed(*few_rows.weigh(affinity, ids, scale, normalise))
    gates = affinity.gather(-1, ids)
    if normalise:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    with torch.no_grad():
        load = _count(ids, affinity.shape[-1])
        top = _count(affinity.topk(ids.shape[-1], dim=-1, sorted=False).indices, affinity.shape[-1])
    mean = (affinity / (affinity.sum(-1, keepdim=True) + 1e-20)).mean(1)
    return Weighed(gates * scale, load, top, mean)


def _count(ids: Tensor, n_experts: int) -> Tensor:
    counts = torch.zeros(len(ids), n_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(1, ids.flatten(1), torch.ones_like(ids).flatten(1))

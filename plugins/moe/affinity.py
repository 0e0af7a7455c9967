"""What routers share: affinities of tokens for experts, and the statistics of a choice."""

from typing import Literal

import torch
from torch import Tensor, nn

from tangram.core.context import Context
from tangram.core.layers import normal_
from tangram.core.records import RouterStats, Routing

Score = Literal["sigmoid", "softmax"]


class Centroids(nn.Module):
    """One vector for each expert; the affinity is the score of its product with the token."""

    def __init__(self, ctx: Context, n_experts: int, score: Score) -> None:
        super().__init__()
        self.init_std, self.score = ctx.init_std, score
        self.weight = nn.Parameter(torch.empty(n_experts, ctx.dim, dtype=ctx.precision.master))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors from a normal distribution."""
        normal_(self.weight, self.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the affinities [B, S, E] of x [B, S, D], computed in float32 or better (equation 15)."""
        logits = nn.functional.linear(x.to(self.weight.dtype), self.weight)
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)


def routing(affinity: Tensor, ids: Tensor, scale: float, normalise: bool) -> Routing:
    """Return the routing of a choice: gates from the unbiased affinities, and the choice counted per sequence.

    Args:
        affinity: Affinities [B, S, E].
        ids: Chosen experts, int64 [B, S, K].
        scale: Multiplies the gates.
        normalise: Divide the gates of a token by their sum first (equation 13).
    """
    gates = affinity.gather(-1, ids)
    if normalise:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    with torch.no_grad():
        load = _count(ids, affinity.shape[-1])
        top = _count(affinity.topk(ids.shape[-1], dim=-1, sorted=False).indices, affinity.shape[-1])
    mean = (affinity / (affinity.sum(-1, keepdim=True) + 1e-20)).mean(1)  # equations 19 and 20
    stats = RouterStats(ids=ids, load=load, top=top, affinity=mean)
    return Routing(ids=ids.flatten(0, 1), gates=(gates * scale).flatten(0, 1), stats=stats)


def _count(ids: Tensor, n_experts: int) -> Tensor:
    counts = torch.zeros(len(ids), n_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(1, ids.flatten(1), torch.ones_like(ids).flatten(1))

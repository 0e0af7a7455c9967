"""What routers share: affinities of tokens for experts, and the statistics of a choice."""

from typing import Literal

import torch
from torch import Tensor, nn

from tangram.core.context import Context
from tangram.core.layers import normal_
from tangram.core.records import RouterStats, Routing
from tangram.kernels import product_transposed, weigh

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
        logits = product_transposed(x.to(self.weight.dtype), self.weight)
        return logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)


def routing(affinity: Tensor, ids: Tensor, scale: float, normalise: bool) -> Routing:
    """Return the routing of a choice: gates from the unbiased affinities, and the choice counted per sequence.

    Args:
        affinity: Affinities [B, S, E].
        ids: Chosen experts, int64 [B, S, K].
        scale: Multiplies the gates.
        normalise: Divide the gates of a token by their sum first (equation 13).
    """
    gates, load, top, mean = weigh(affinity, ids, scale, normalise)
    stats = RouterStats(ids=ids, load=load, top=top, affinity=mean)
    return Routing(ids=ids.flatten(0, 1), gates=gates.flatten(0, 1), stats=stats)

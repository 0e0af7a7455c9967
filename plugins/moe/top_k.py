"""Plain top-k routing (arXiv:1701.06538; softmax before the choice, as in arXiv:2401.06066)."""

import torch
from attrs import field, frozen
from attrs.validators import gt, in_
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Router
from tangram.core.records import Routing
from tangram.core.registry import component
from tangram.plugins.moe.affinity import Centroids, Score, routing


@component("router", use="top_k", capabilities=["normalised"])
@frozen(kw_only=True)
class TopKConfig:
    """Choose the experts of highest affinity among all.

    Attributes:
        top_k: Experts K for each token.
        score: How a product becomes an affinity.
        normalise: Divide a token's gates by their sum.
    """

    top_k: int = field(validator=gt(0))
    score: Score = field(default="softmax", validator=in_(("sigmoid", "softmax")))
    normalise: bool = True

    def build(self, ctx: Context, n_experts: int) -> Router:
        """Build it.

        Raises:
            ValueError: There are fewer than `top_k` experts.
        """
        if self.top_k > n_experts:
            raise ValueError(f"top_k {self.top_k} is more than the {n_experts} experts")
        return TopK(self, ctx, n_experts)


class TopK(Router):
    """Plain top-k routing."""

    def __init__(self, config: TopKConfig, ctx: Context, n_experts: int) -> None:
        super().__init__()
        self.top_k, self.normalise = config.top_k, config.normalise
        self.centroids = Centroids(ctx, n_experts, config.score)

    def forward(self, x: Tensor, bias: Tensor) -> Routing:
        """Return the routing of x [B, S, D]; the bias [E] moves only the choice."""
        affinity = self.centroids(x)
        with torch.no_grad():
            ids = (affinity + bias).topk(self.top_k, dim=-1, sorted=False).indices
        return routing(affinity, ids, 1.0, self.normalise)

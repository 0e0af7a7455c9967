"""A router by cosine similarity on a small hypersphere (X-MoE, arXiv:2204.09179).

    s_i = softmax_i(cos(W x, e_i) / temperature)

The centroids e_i and the projected token W x are normalised, so that no expert attracts tokens by the length of its
centroid, and W makes the space in which they are compared small. The temperature is learned.
"""

import math

import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from tangram.core import component
from tangram.core.context import Context
from tangram.core.contracts import Router
from tangram.core.records import Routing
from tangram.plugins.moe.affinity import routing


@component("router", use="cosine")
@frozen(kw_only=True)
class CosineConfig:
    """Choose the experts whose centroids point most nearly where the projected token does (arXiv:2204.09179).

    Attributes:
        top_k: Experts K for each token.
        rank: Width of the space in which token and centroids are compared.
        temperature: Initial temperature: divides the cosines under the softmax, and is learned.
        normalise: Divide a token's gates by their sum.
    """

    top_k: int = field(validator=gt(0))
    rank: int = field(default=16, validator=gt(0))
    temperature: float = field(default=0.1, validator=gt(0.0))
    normalise: bool = True

    def build(self, ctx: Context, n_experts: int) -> Router:
        """Build it.

        Raises:
            ValueError: There are fewer than `top_k` experts.
        """
        if self.top_k > n_experts:
            raise ValueError(f"top_k {self.top_k} is more than the {n_experts} experts")
        return CosineRouter(self, ctx, n_experts)


class CosineRouter(Router):
    """Routing by cosine similarity; a bias moves the choice and never a gate."""

    def __init__(self, config: CosineConfig, ctx: Context, n_experts: int) -> None:
        super().__init__()
        self.config, self.top_k = config, config.top_k
        dtype = ctx.precision.master
        self.projection = nn.Parameter(torch.empty(config.rank, ctx.dim, dtype=dtype))
        self.centroids = nn.Parameter(torch.empty(n_experts, config.rank, dtype=dtype))
        self.log_temperature = nn.Parameter(torch.empty((), dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw directions that are uniform on the sphere: their lengths do not matter."""
        nn.init.normal_(self.projection, std=self.projection.shape[1] ** -0.5)
        nn.init.normal_(self.centroids)
        nn.init.constant_(self.log_temperature, math.log(self.config.temperature))

    def affinity(self, x: Tensor) -> Tensor:
        """Return the affinities [B, S, E] of x [B, S, D], in float32 or better."""
        token = normalize(linear(x.to(self.projection.dtype), self.projection), dim=-1)  # [B, S, rank]
        cosine = linear(token, normalize(self.centroids, dim=-1))
        return (cosine * (-self.log_temperature).exp()).softmax(-1)

    def forward(self, x: Tensor, bias: Tensor) -> Routing:
        """Return the routing of x [B, S, D]; the bias [E] moves only the choice."""
        affinity = self.affinity(x)
        with torch.no_grad():
            ids = (affinity + bias).topk(self.top_k, dim=-1, sorted=False).indices
        return routing(affinity, ids, scale=1.0, normalise=self.config.normalise)

"""The router of DeepSeek-V3: node-limited, its choice moved by a bias (arXiv:2412.19437, equations 12 to 16)."""

from attrs import field, frozen
from attrs.validators import ge, gt, in_, le
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Router
from tangram.core.records import Routing
from tangram.core.registry import component
from tangram.kernels import choose
from tangram.plugins.moe.affinity import Centroids, Score, routing


@component("router", use="group_limited", capabilities=["groups", "normalised"])
@frozen(kw_only=True)
class GroupLimitedConfig:
    """Choose the best groups of experts first (each on one node), then the best experts inside them.

    Attributes:
        top_k: Experts K for each token.
        score: How a product becomes an affinity.
        n_groups: Groups of experts.
        top_groups: Groups that a token may reach.
        normalise: Divide a token's gates by their sum.
        gate_scale: Multiplies the gates.
    """

    top_k: int = field(validator=gt(0))
    score: Score = field(default="sigmoid", validator=in_(("sigmoid", "softmax")))
    n_groups: int = field(default=1, validator=gt(0))
    top_groups: int = field(default=1, validator=gt(0))
    normalise: bool = True
    gate_scale: float = field(default=1.0, validator=[ge(1e-3), le(1e3)])  # beyond, gates leave float32's range

    def __attrs_post_init__(self) -> None:
        if self.top_groups > self.n_groups:
            raise ValueError(f"top_groups {self.top_groups} is more than n_groups {self.n_groups}")

    def build(self, ctx: Context, n_experts: int) -> Router:
        """Build it.

        Raises:
            ValueError: The groups do not divide the experts, or hold fewer than `top_k`.
        """
        if n_experts % self.n_groups:
            raise ValueError(f"n_groups {self.n_groups} does not divide the {n_experts} experts")
        reachable = n_experts // self.n_groups * self.top_groups
        if self.top_k > reachable:
            within = f"the {reachable} experts in {self.top_groups} of {self.n_groups} groups"
            raise ValueError(f"top_k {self.top_k} is more than {within}")
        return GroupLimited(self, ctx, n_experts)


class GroupLimited(Router):
    """Node-limited routing."""

    def __init__(self, config: GroupLimitedConfig, ctx: Context, n_experts: int) -> None:
        super().__init__()
        self.config, self.top_k = config, config.top_k
        self.centroids = Centroids(ctx, n_experts, config.score)

    def forward(self, x: Tensor, bias: Tensor) -> Routing:
        """Return the routing of x [B, S, D]; the bias [E] moves only the choice."""
        affinity = self.centroids(x)
        c = self.config
        ids = choose(affinity + bias, c.top_k, c.n_groups, c.top_groups)
        return routing(affinity, ids, c.gate_scale, c.normalise)

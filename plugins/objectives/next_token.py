"""The main loss: cross entropy of the next token."""

from attrs import field, frozen
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Objective, Shared, TokenObjective
from tangram.core.curve import Curve
from tangram.core.experiment import BlockConfig
from tangram.core.records import Batch, Loss
from tangram.core.registry import component


@component("objective", use="next_token")
@frozen(kw_only=True)
class NextTokenConfig:
    """Predict the next token.

    Attributes:
        weight: Weight of the loss; a number or a curve over tokens.
    """

    weight: Curve = field(default=Curve.constant(1.0))

    def build(self, ctx: Context, block: BlockConfig) -> Objective:
        """Build it."""
        return NextToken(self)


class NextToken(TokenObjective):
    """Cross entropy in nats, summed and divided by the global number of targets."""

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()
        self.curve = config.weight

    def forward(self, trunk: Tensor, batch: Batch, shared: Shared) -> Loss:
        """Return the loss of trunk [B, S, D]."""
        assert batch.targets is not None
        return Loss(shared.head.loss(shared.norm(trunk), batch.targets, batch.n_targets))

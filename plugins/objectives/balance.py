"""Balance losses on the routers: over each sequence (arXiv:2412.19437, equations 17 to 20) and over the batch."""

from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Objective
from tangram.core.curve import Curve
from tangram.core.experiment import BlockConfig
from tangram.core.records import Batch, Progress, RouterStats
from tangram.core.registry import component

Count = Literal["unbiased", "routed"]


@component("objective", use="sequence_balance", capabilities=["micro_batches"])
@frozen(kw_only=True)
class SequenceBalanceConfig:
    """Keep the experts of each sequence from extreme imbalance.

    Attributes:
        weight: Weight alpha of the loss; a number or a curve over tokens.
        count: Which choice f counts: `unbiased`, the K best affinities as in equation 18, or `routed`, what the
            router chose under bias and groups.
    """

    weight: Curve = field(default=Curve.constant(1e-4))
    count: Count = field(default="unbiased", validator=in_(("unbiased", "routed")))

    def build(self, ctx: Context, block: BlockConfig) -> Objective:
        """Build it."""
        return SequenceBalance(self)


class SequenceBalance:
    """sum_i f_i P_i of each sequence, averaged over the global batch's sequences; 1 where affinities are uniform."""

    def __init__(self, config: SequenceBalanceConfig) -> None:
        self.curve, self.count = config.weight, config.count

    def weight(self, now: Progress) -> float:
        """Return the gradient put on this loss."""
        return self.curve(now)

    def __call__(self, stats: RouterStats, batch: Batch) -> Tensor:
        """Return the loss of one block; a sequence is a packed row."""
        frequency = _frequency(_counted(stats, self.count), stats)  # [B, E]
        return (frequency * stats.affinity).sum() / batch.n_sequences


@component("objective", use="batch_balance")
@frozen(kw_only=True)
class BatchBalanceConfig:
    """Balance the experts over each micro-batch instead of each sequence (arXiv:2412.19437, section 4.5.3).

    Attributes:
        weight: Weight of the loss; a number or a curve over tokens.
        count: Which choice f counts: `unbiased` or `routed`, as in `sequence_balance`.
    """

    weight: Curve = field(default=Curve.constant(1e-4))
    count: Count = field(default="unbiased", validator=in_(("unbiased", "routed")))

    def build(self, ctx: Context, block: BlockConfig) -> Objective:
        """Build it."""
        return BatchBalance(self)


class BatchBalance:
    """sum_i f_i P_i with f and P over all tokens of a micro-batch, averaged over micro-batches by their sequences."""

    def __init__(self, config: BatchBalanceConfig) -> None:
        self.curve, self.count = config.weight, config.count

    def weight(self, now: Progress) -> float:
        """Return the gradient put on this loss."""
        return self.curve(now)

    def __call__(self, stats: RouterStats, batch: Batch) -> Tensor:
        """Return the loss of one block."""
        frequency = _frequency(_counted(stats, self.count), stats).mean(0)  # [E]
        return (frequency * stats.affinity.mean(0)).sum() * len(stats.ids) / batch.n_sequences


def _counted(stats: RouterStats, count: Count) -> Tensor:
    return stats.top if count == "unbiased" else stats.load


def _frequency(counts: Tensor, stats: RouterStats) -> Tensor:
    """Return f [B, E] of equation 18: counts times E / (K S)."""
    _, length, top_k = stats.ids.shape
    return counts.to(stats.affinity.dtype) * (counts.shape[-1] / (top_k * length))

"""DeepSeek-V2's balance losses over devices: their work, and what is sent to them (arXiv:2405.04434, section 2.2.3).

The E routed experts lie in D groups of consecutive ones, E_1 to E_D, one on each device. With f_j and P_j the
frequency and the mean affinity of expert j in a sequence of T tokens (equations 24 and 25),

    f_j = E / (K T) * sum_t 1(token t selects expert j)      P_j = 1 / T * sum_t s_jt

the losses of a sequence, here averaged over the global batch's sequences, are

    device          sum_i f'_i P'_i      f'_i = mean of f_j over E_i                             (equations 26 to 28)
    communication   sum_i f"_i P'_i      f"_i = D / (M T) * sum_t 1(token t is sent to device i)  (equations 29 to 31)

with P'_i the sum of P_j over E_i, and M the number of devices that a token may be sent to. Both are 1 where all is even
and every token is sent to M devices. The counts have no gradient; it flows through the affinities.
"""

import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor

from tangram.core import component
from tangram.core.context import Context
from tangram.core.contracts import Objective
from tangram.core.curve import Curve
from tangram.core.experiment import BlockConfig
from tangram.core.records import Batch, Progress, RouterStats
from tangram.plugins.moe.moe import MoEConfig


@component("objective", use="device_balance")
@frozen(kw_only=True)
class DeviceBalanceConfig:
    """Keep the work of the devices even in each sequence (arXiv:2405.04434, equations 26 to 28).

    Attributes:
        weight: Weight alpha_2 of the loss; a number or a curve over tokens.
        n_devices: Devices D, each with as many consecutive experts.
    """

    weight: Curve = field(default=Curve.constant(0.05))
    n_devices: int = field(validator=gt(0))

    def build(self, ctx: Context, block: BlockConfig) -> Objective:
        """Build it.

        Raises:
            ValueError: The devices do not divide the experts.
        """
        _check_divides(self.n_devices, block)
        return DeviceBalance(self)


class DeviceBalance:
    """sum_i f'_i P'_i of each sequence, averaged over the global batch's sequences."""

    def __init__(self, config: DeviceBalanceConfig) -> None:
        self.curve, self.n_devices = config.weight, config.n_devices

    def weight(self, now: Progress) -> float:
        """Return the gradient put on this loss."""
        return self.curve(now)

    def __call__(self, stats: RouterStats, batch: Batch) -> Tensor:
        """Return the loss of one block and one micro-batch."""
        _, length, top_k = stats.ids.shape
        experts = stats.load.shape[-1]
        frequency = stats.load.to(stats.affinity.dtype) * (experts / (top_k * length))  # f, [B, E]
        of_devices = frequency.reshape(len(frequency), self.n_devices, -1).mean(-1)  # f', [B, D]
        return (of_devices * _of_devices(stats, self.n_devices)).sum() / batch.n_sequences


@component("objective", use="communication_balance")
@frozen(kw_only=True)
class CommunicationBalanceConfig:
    """Keep even in each sequence how many tokens the devices are sent (arXiv:2405.04434, equations 29 to 31).

    Attributes:
        weight: Weight alpha_3 of the loss; a number or a curve over tokens.
        n_devices: Devices D, each with as many consecutive experts.
        top_devices: Devices M that a token may be sent to, as the router limits them.
    """

    weight: Curve = field(default=Curve.constant(0.02))
    n_devices: int = field(validator=gt(0))
    top_devices: int = field(validator=gt(0))

    def __attrs_post_init__(self) -> None:
        if self.top_devices > self.n_devices:
            raise ValueError(f"top_devices {self.top_devices} is more than n_devices {self.n_devices}")

    def build(self, ctx: Context, block: BlockConfig) -> Objective:
        """Build it.

        Raises:
            ValueError: The devices do not divide the experts.
        """
        _check_divides(self.n_devices, block)
        return CommunicationBalance(self)


class CommunicationBalance:
    """sum_i f"_i P'_i of each sequence, averaged over the global batch's sequences."""

    def __init__(self, config: CommunicationBalanceConfig) -> None:
        self.curve, self.n_devices, self.top_devices = config.weight, config.n_devices, config.top_devices

    def weight(self, now: Progress) -> float:
        """Return the gradient put on this loss."""
        return self.curve(now)

    def __call__(self, stats: RouterStats, batch: Batch) -> Tensor:
        """Return the loss of one block and one micro-batch."""
        batch_size, length, _ = stats.ids.shape
        device = stats.ids // (stats.load.shape[-1] // self.n_devices)  # [B, S, K]
        sent = torch.zeros(batch_size, length, self.n_devices, dtype=stats.affinity.dtype, device=device.device)
        sent.scatter_(-1, device, 1.0)  # a token is sent once to a device, however many of its experts it chose
        frequency = sent.sum(1) * (self.n_devices / (self.top_devices * length))  # f", [B, D]
        return (frequency * _of_devices(stats, self.n_devices)).sum() / batch.n_sequences


def _of_devices(stats: RouterStats, n_devices: int) -> Tensor:
    """Return P' [B, D], the mean affinities of each device's experts together (equations 28 and 31)."""
    return stats.affinity.reshape(len(stats.affinity), n_devices, -1).sum(-1)


def _check_divides(n_devices: int, block: BlockConfig) -> None:
    if isinstance(block.feedforward, MoEConfig) and block.feedforward.n_experts % n_devices:
        raise ValueError(f"n_devices {n_devices} does not divide the {block.feedforward.n_experts} experts")

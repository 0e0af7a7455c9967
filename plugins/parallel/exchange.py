"""Rows on their way between ranks: who sends how many to whom, and the form in which they travel."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from attrs import frozen
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from tangram.core.groups import Groups
from tangram.kernels import Order, dequantize, quantize_tiles
from tangram.kernels.native import passes_for

Wire: TypeAlias = Literal["compute", "bf16", "fp8"]
"""How rows travel: as they are, in bfloat16, or in E4M3 with a scale for each 1 x 128 of them."""

WIRES: tuple[Wire, ...] = ("compute", "bf16", "fp8")

_TILE = 128


def homeward(wire: Wire) -> Wire:
    """Return how travels what comes home to be summed: in bfloat16 where the way out is in FP8.

    That is what combine brings, and the gradient of what was dispatched (arXiv:2412.19437, section 3.3.3). The gradient
    of what combine brings is dispatched itself, so it travels as rows do.
    """
    return "bf16" if wire == "fp8" else wire


@frozen(eq=False)
class Peers:
    """Ranks that exchange rows, this one among them. Alone, it talks to no process.

    Attributes:
        ranks: Which they are.
        groups: Where their group of processes comes from, once something is exchanged.
    """

    ranks: tuple[int, ...]
    groups: Groups

    def __attrs_post_init__(self) -> None:
        self.groups.want(self.ranks)

    def swap(self, tensor: Tensor, sent: Sequence[int] | None = None, received: Sequence[int] | None = None) -> Tensor:
        """Give each peer its part of the first dimension, and return what they gave, in their order.

        Args:
            tensor: [M, ...].
            sent: Rows for each peer; equal parts if left out.
            received: Rows from each peer; equal parts if left out.
        """
        if len(self.ranks) == 1:
            return tensor
        arrived = tensor.new_empty(len(tensor) if received is None else sum(received), *tensor.shape[1:])
        parts, arriving = (None if each is None else list(each) for each in (sent, received))
        distributed.all_to_all_single(arrived, tensor.contiguous(), arriving, parts, self.groups.of(self.ranks))
        return arrived


@frozen(eq=False)
class Way:
    """One exchange of rows.

    Attributes:
        peers: Between whom.
        sent: Rows for each.
        received: Rows from each.
    """

    peers: Peers
    sent: Sequence[int]
    received: Sequence[int]

    @property
    def back(self) -> "Way":
        """The same rows on their way back."""
        return Way(self.peers, self.received, self.sent)

    def carry(self, tensor: Tensor) -> Tensor:
        """Return what arrives here when each rank sends a tensor of its rows; without gradient."""
        return self.peers.swap(tensor, self.sent, self.received)


def exchange(rows: Tensor, way: Way, wire: Wire, gradient: Wire) -> Tensor:
    """Return the rows [M, D] that arrive here, in the dtype of those that are sent.

    Args:
        rows: Those of the first peer first.
        way: The numbers of them.
        wire: How they travel.
        gradient: How their gradient does, on the way back.
    """
    arrived: Tensor = _Exchange.apply(rows, way, wire, gradient)
    return arrived


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, way, wire, gradient):  # type: ignore[no-untyped-def]
        ctx.way, ctx.gradient = way, gradient
        return _carried(rows, way, wire)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _carried(grad, ctx.way.back, ctx.gradient), None, None, None


def _carried(rows: Tensor, way: Way, wire: Wire) -> Tensor:
    width = rows.shape[1]
    match wire:
        case "compute":
            return way.carry(rows)
        case "bf16":
            return way.carry(rows.bfloat16()).to(rows.dtype)
        case "fp8":
            passes = passes_for(rows)
            codes, scales = quantize_tiles(rows, _TILE, power_of_two=True, passes=passes)
            # One message of bytes: gloo and NCCL know no FP8.
            arrived = way.carry(torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], 1))
            codes, scales = (_aligned(part) for part in (arrived[:, :width], arrived[:, width:]))
            tiles = codes.view(torch.float8_e4m3fn), scales.view(torch.float32)
            return dequantize(*tiles, (1, _TILE), dtype=rows.dtype, passes=passes)


def _aligned(part: Tensor) -> Tensor:
    """Return a copy that may be seen as another dtype."""
    return part.clone(memory_format=torch.contiguous_format)


def regroup(counts: Tensor, total: int) -> tuple[Order, Order]:
    """Return the order in which experts take the rows that arrive, and the order back.

    Args:
        counts: Rows of each block in the order of arrival, int64 [peers, experts, ...]: in what comes back the peer is
            what they are sorted by last.
        total: Their sum.
    """
    begins = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    begins, sizes = (each.movedim(0, -1).flatten() for each in (begins, counts))
    places = torch.arange(total, device=counts.device)
    shift = begins - (sizes.cumsum(0) - sizes)
    index = shift.repeat_interleave(sizes, output_size=total) + places  # told the size, it waits for no device
    inverse = torch.empty_like(index).scatter_(0, index, places)
    there, back = (Order(one, other.unsqueeze(1), sizes, one) for one, other in ((index, inverse), (inverse, index)))
    return there, back

"""Gradients and weights among the ranks that hold them: what every sharding of whole parameters does.

One rule sums everything: the gradient of a parameter is the sum over all ranks that hold it, those of a share of the
experts over the holders of the same share. That covers data parallelism, the two replicas of a stage in DualPipe, and
an embedding that the first and the last stage use.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from attrs import frozen
from torch import Tensor, distributed, nn

from tangram.core.context import Parallel
from tangram.core.model import Model
from tangram.core.records import GradientNorm

Named = tuple[str, nn.Parameter]

_MESSAGE = 1 << 25
"""Values that travel in one message: enough for the network, and no second copy of the model in memory."""


@frozen(eq=False)
class Bucket:
    """Parameters that the same ranks hold.

    Attributes:
        ranks: Those ranks, in order.
        parameters: The parameters with their addresses, in the order of the model.
    """

    ranks: tuple[int, ...]
    parameters: tuple[Named, ...]


def buckets(model: Model, parallel: Parallel) -> list[Bucket]:
    """Return the model's parameters by holders, in an order in which any two ranks meet their common ones."""
    found, experts = defaultdict[tuple[int, ...], list[Named]](list), model.shares()
    for address, parameter in model.named_parameters():
        found[parallel.layout.holders(model.stages_of(address), address in experts)].append((address, parameter))
    for ranks in found:
        parallel.groups.want(ranks)
    return [Bucket(ranks, tuple(found[ranks])) for ranks in sorted(found)]


def rows_of(model: Model, parallel: Parallel) -> Mapping[str, range]:
    """Return which experts are here, for each address of which not all are."""
    return model.shares() if parallel.layout.expert_ranks > 1 else {}


def messages(parameters: Sequence[Named]) -> Iterator[list[Named]]:
    """Yield the parameters in pieces that travel together."""
    piece, size = list[Named](), 0
    for named in parameters:
        if piece and size + named[1].numel() > _MESSAGE:
            yield piece
            piece, size = [], 0
        piece.append(named)
        size += named[1].numel()
    if piece:
        yield piece


@torch.no_grad()
def packed_gradients(piece: Sequence[Named]) -> Tensor:
    """Return the gradients in one row, at least float32, and behind them whether each parameter has one."""
    dtype = torch.promote_types(piece[0][1].dtype, torch.float32)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in piece]
    has = [p.new_tensor([p.grad is not None], dtype=dtype) for _, p in piece]
    return torch.cat([part.flatten().to(dtype) for part in parts] + has)


@torch.no_grad()
def unpack_gradients(piece: Sequence[Named], row: Tensor) -> None:
    """Give the parameters the summed gradients; none where no rank had any."""
    *parts, has = row.split([p.numel() for _, p in piece] + [len(piece)])
    for (_, p), part, some in zip(piece, parts, has.tolist(), strict=True):
        p.grad = part.view_as(p).to(p.dtype) if some else None


@torch.no_grad()
def broadcast(piece: Sequence[Named], source: int, group: distributed.ProcessGroup) -> None:
    """Give every rank of the group the values that the rank `source` has."""
    row = torch.cat([p.flatten() for _, p in piece])
    distributed.broadcast(row, source, group=group)
    for (_, p), part in zip(piece, row.split([p.numel() for _, p in piece]), strict=True):
        p.copy_(part.view_as(p))


@torch.no_grad()
def clip(counted: Sequence[Named], held: Sequence[Named], limit: float, parallel: Parallel) -> GradientNorm:
    """Scale gradients down to a global L2 norm of `limit`; leave them if the norm is not finite.

    Args:
        counted: What this rank counts: every parameter of the model is counted on one rank.
        held: What this rank scales.
        limit: The largest norm.
        parallel: Which rank this is.
    """
    everyone = range(parallel.layout.ranks)
    found = [(address, p.grad) for address, p in counted if p.grad is not None]
    squares = torch.zeros(1, dtype=torch.float64, device=parallel.device)
    norms = squares
    if found:
        norms = torch.stack(torch._foreach_norm([grad for _, grad in found])).double()
        squares = norms.square().sum().view(1)
    value = float(parallel.groups.sum(squares, everyone).sqrt())
    if not math.isfinite(value):
        finite = torch.isfinite(norms).tolist()
        broken = [address for (address, _), ok in zip(found, finite, strict=False) if not ok]
        return GradientNorm(value, tuple(dict.fromkeys(parallel.groups.gather(broken, everyone))))
    grads = [p.grad for _, p in held if p.grad is not None]
    if value > limit and grads:
        torch._foreach_mul_(grads, limit / value)
    return GradientNorm(value)

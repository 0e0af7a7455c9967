"""Parameters that are whole together, and of which each of some ranks keeps rows."""

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor, nn

from tangram.core.context import Parallel
from tangram.core.contracts import Shard
from tangram.plugins.parallel.holders import Named


@frozen(eq=False)
class Weight:
    """A parameter that is shared out by its first dimension: as many rows for each rank, but for what the last lack.

    Attributes:
        address: Its address.
        whole: All of it. It has memory only while its unit is whole, and is the same object all the time: who works
            with it may hold it.
        memory: That memory, flat, with room for as many rows of every rank.
        kept: The rows that are kept here.
        rows: Which they are.
    """

    address: str
    whole: nn.Parameter
    memory: Tensor
    kept: nn.Parameter
    rows: range


def shared_out(address: str, parameter: nn.Parameter, place: int, ranks: int) -> tuple[Tensor, range]:
    """Return memory for all of a parameter, and which rows the rank with this place has of it.

    Raises:
        ValueError: It has no rows.
    """
    if not parameter.ndim or not parameter.numel():
        raise ValueError(f"{address} has no rows to share out")
    height = -(-len(parameter) // ranks)
    memory = torch.empty_like(parameter, requires_grad=False).new_empty(ranks * height * parameter[0].numel())
    first = min(place * height, len(parameter))
    return memory, range(first, min(first + height, len(parameter)))


class Unit:
    """Parameters that are whole together.

    Args:
        ranks: Who shares them out.
        named: The parameters with their addresses, of one dtype, whole as they are at first.
        parallel: Which rank this is.

    Attributes:
        weights: The parameters.
        whole: Whether they are whole now.
        owes: Whether a backward may have left gradients that are not summed yet.
    """

    def __init__(self, ranks: tuple[int, ...], named: Sequence[Named], parallel: Parallel) -> None:
        self.ranks, self._parallel = ranks, parallel
        place = ranks.index(parallel.layout.rank)
        shared = [shared_out(address, parameter, place, len(ranks)) for address, parameter in named]
        self._parts = [len(memory) // len(ranks) for memory, _ in shared]
        self._row = shared[0][0].new_zeros(sum(self._parts))
        self.weights: list[Weight] = []
        for (address, parameter), (memory, rows), room in zip(named, shared, self._row.split(self._parts), strict=True):
            mine = parameter.detach()[rows.start : rows.stop]
            kept = Shard(room[: mine.numel()].view_as(mine).copy_(mine))
            whole = nn.Parameter(memory[: parameter.numel()].view_as(parameter))
            self.weights.append(Weight(address, whole, memory, kept, rows))
        self._had = self._row.new_zeros(len(named))
        self.whole = self.owes = False
        self.let_go()

    def gather(self) -> None:
        """Make the parameters whole."""
        if not self.whole:
            rows = self._parallel.groups.every_row(self._row, self.ranks)
            for weight, part in zip(self.weights, rows.split(self._parts, 1), strict=True):
                weight.memory.untyped_storage().resize_(weight.memory.nbytes)
                # Past the version counter: for autograd the value that it saved is the one that comes back.
                weight.memory.data.view_as(part).copy_(part)
            self.whole = True

    def let_go(self) -> None:
        """Give up what others keep, once the gradients of a backward are summed."""
        if self.owes:
            self.reduce()
        for weight in self.weights:
            weight.memory.untyped_storage().resize_(0)
        self.whole = False

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over the ranks, in float32 or wider, and add to those of the rows that are kept here."""
        wide = torch.promote_types(self._row.dtype, torch.float32)
        rows = self._row.new_zeros(len(self.ranks), sum(self._parts) + len(self.weights), dtype=wide)
        *parts, has = rows.split([*self._parts, len(self.weights)], 1)
        for number, (weight, part) in enumerate(zip(self.weights, parts, strict=True)):
            if (grad := weight.whole.grad) is not None:
                flat, (full, rest) = grad.flatten(), divmod(grad.numel(), part.shape[1])
                part[:full] = flat[: grad.numel() - rest].view(full, part.shape[1])
                part[full : full + 1, :rest] = flat[grad.numel() - rest :]
                has[:, number] = 1
                weight.whole.grad = None
        *sums, has = self._parallel.groups.sum_row(rows, self.ranks).split([*self._parts, len(self.weights)])
        self._had += has
        for weight, added in zip(self.weights, sums, strict=True):
            kept = weight.kept
            grad = added[: kept.numel()].view_as(kept).to(kept.dtype)
            kept.grad = grad if kept.grad is None else kept.grad.add_(grad)
        self.owes = False

    @property
    def late(self) -> bool:
        """Whether gradients came after the parameters were let go: those of weights can wait."""
        return any(weight.whole.grad is not None for weight in self.weights)

    def settle(self) -> None:
        """Let go of the gradients of parameters of which no rank had any."""
        for weight, had in zip(self.weights, self._had.tolist(), strict=True):
            if not had:
                weight.kept.grad = None
        self._had.zero_()

"""The groups of processes that a rank talks in, over torch.distributed."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, distributed

_T = TypeVar("_T")


class Groups:
    """Makes each group once. All its members must ask for their common groups in one order."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], distributed.ProcessGroup] = {}

    def of(self, ranks: Sequence[int]) -> distributed.ProcessGroup:
        """Return the group of these ranks, of which this must be one."""
        key = tuple(ranks)
        if key not in self._made:
            self._made[key] = _group(ranks)
        return self._made[key]

    def aside(self, ranks: Sequence[int]) -> distributed.ProcessGroup:
        """Return one more group of these ranks, for a thread of its own; all of them must ask at once."""
        return _group(ranks, "gloo")

    def sum(self, tensor: Tensor, ranks: Sequence[int]) -> Tensor:
        """Sum a tensor over ranks, in place, and return it; nothing is to be done for one rank."""
        if len(ranks) > 1:
            distributed.all_reduce(tensor, group=self.of(ranks))
        return tensor

    def gather(self, items: list[_T], ranks: Sequence[int], group: distributed.ProcessGroup | None = None) -> list[_T]:
        """Return the items of all these ranks in their order; over a `group` aside, or else their common one."""
        if len(ranks) == 1:
            return items
        found: list[list[_T]] = [[] for _ in ranks]
        distributed.all_gather_object(found, items, group=group or self.of(ranks))
        return [item for each in found for item in each]

    def largest(self, values: Tensor, ranks: Sequence[int]) -> Tensor:
        """Take the largest of each value over ranks, in place, and return them."""
        if len(ranks) > 1:
            distributed.all_reduce(values, distributed.ReduceOp.MAX, group=self.of(ranks))
        return values


def _group(ranks: Sequence[int], backend: str | None = None) -> distributed.ProcessGroup:
    # Only members take part: two thousand ranks do not wait for each other's groups.
    made: distributed.ProcessGroup = distributed.new_group(list(ranks), backend=backend, use_local_synchronization=True)
    return made

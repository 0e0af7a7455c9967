"""The groups of processes that a rank talks in, over torch.distributed."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, distributed

_T = TypeVar("_T")

_Key = tuple[tuple[int, ...], str]

# torch 2.13 has other names for these and warns of the old ones; 2.11 does not have the new ones.
_gather_rows = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_scatter_rows = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class Groups:
    """The groups that pieces of a rank want. They are made all at once, by all ranks: those of others too.

    Ranks that made groups by themselves, each in its own order, would wait for each other for ever. The same ranks may
    have several groups, each of a name: what is said in one does not wait for what is said in another.
    """

    def __init__(self) -> None:
        self._wanted: set[_Key] = set()
        self._made: dict[_Key, distributed.ProcessGroup] = {}

    def want(self, ranks: Sequence[int], name: str = "") -> None:
        """Say that this rank will talk in the group of these ranks that has this name."""
        if len(ranks) > 1:
            self._wanted.add((tuple(ranks), name))

    def open(self) -> None:
        """Make the groups that any rank wants and that are not made yet; all ranks must call this at once."""
        wanted: list[set[_Key]] = [set() for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(wanted, self._wanted)
        for ranks, name in sorted(set[_Key]().union(*wanted) - self._made.keys()):
            self._made[ranks, name] = distributed.new_group(list(ranks))
        self._wanted.clear()

    def of(self, ranks: Sequence[int], name: str = "") -> distributed.ProcessGroup:
        """Return the group of these ranks, of which this must be one; on first use those that are wanted are made."""
        key = tuple(ranks), name
        if key not in self._made:
            self._wanted.add(key)
            self.open()
        return self._made[key]

    def aside(self) -> distributed.ProcessGroup:
        """Return one more group of all ranks, for a thread of its own; all of them must ask at once."""
        made: distributed.ProcessGroup = distributed.new_group(backend="gloo")
        return made

    def sum(self, tensor: Tensor, ranks: Sequence[int]) -> Tensor:
        """Sum a tensor over ranks, in place, and return it; nothing is to be done for one rank."""
        if len(ranks) > 1:
            distributed.all_reduce(tensor, group=self.of(ranks))
        return tensor

    def every_row(self, row: Tensor, ranks: Sequence[int]) -> Tensor:
        """Return the rows [R, L] of R ranks, of which each gives its own [L]."""
        rows = row.new_empty(len(ranks) * len(row))
        _gather_rows(rows, row, group=self.of(ranks))
        return rows.view(len(ranks), -1)

    def sum_row(self, rows: Tensor, ranks: Sequence[int]) -> Tensor:
        """Return of the rows [R, L] this one's [L], summed over R ranks; each of them gives all."""
        row = rows.new_empty(rows.shape[1])
        _scatter_rows(row, rows.flatten(), group=self.of(ranks))
        return row

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

"""The groups of processes that a rank talks in, over torch.distributed."""

from collections.abc import Sequence

from torch import Tensor, distributed


class Groups:
    """Makes each group once. All its members must ask for their common groups in one order."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], distributed.ProcessGroup] = {}

    def of(self, ranks: Sequence[int]) -> distributed.ProcessGroup:
        """Return the group of these ranks, of which this must be one."""
        key = tuple(ranks)
        if key not in self._made:
            # Only members take part: two thousand ranks do not wait for each other's groups.
            group = distributed.new_group(list(key), use_local_synchronization=True)
            assert group is not None
            self._made[key] = group
        return self._made[key]

    def sum(self, tensor: Tensor, ranks: Sequence[int]) -> Tensor:
        """Sum a tensor over ranks, in place, and return it; nothing is to be done for one rank."""
        if len(ranks) > 1:
            distributed.all_reduce(tensor, group=self.of(ranks))
        return tensor

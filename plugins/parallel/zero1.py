"""Optimizer states shared out among the holders of a parameter (ZeRO stage 1, arXiv:1910.02054, section 5.1)."""

from collections.abc import Mapping, Sequence

from attrs import frozen
from torch import distributed, nn

from tangram.core.context import Parallel
from tangram.core.contracts import Sharding
from tangram.core.model import Model
from tangram.core.records import GradientNorm
from tangram.core.registry import component
from tangram.plugins.parallel.holders import (
    Bucket,
    Named,
    broadcast,
    buckets,
    clip,
    messages,
    packed_gradients,
    rows_of,
    unpack_gradients,
)


@component("sharding", use="zero1", capabilities=["ranks"])
@frozen(kw_only=True)
class ZeRO1Config:
    """Keep each optimizer state on one of the ranks that hold its parameter.

    Parameters are shared out whole, so that an optimizer of matrices, such as muon, works as well.
    """

    def build(self, parallel: Parallel) -> Sharding:
        """Build it."""
        return ZeRO1(parallel)


class ZeRO1:
    """Each parameter is stepped by its owner, which then gives it to the other holders."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._shares: list[tuple[Bucket, Mapping[int, list[Named]]]] = []
        self._owned: list[Named] = []
        self._rows: Mapping[str, range] = {}

    def attach(self, model: Model) -> Sequence[tuple[str, nn.Parameter]]:
        """Return the parameters that this rank owns, with their addresses."""
        self._rows = rows_of(model, self._parallel)
        self._shares = [(bucket, shares(bucket)) for bucket in buckets(model, self._parallel)]
        self._owned = [named for _, share in self._shares for named in share[self._parallel.layout.rank]]
        return self._owned

    def owned(self) -> frozenset[str]:
        """Return the addresses that this rank steps."""
        return frozenset(address for address, _ in self._owned)

    def rows(self) -> Mapping[str, range]:
        """Return the rank's share of the experts."""
        return self._rows

    def reduce(self) -> None:
        """Sum the gradients over their holders, in float32, at their owners; the others let go of theirs."""
        for bucket, share in self._shares:
            if len(bucket.ranks) > 1:
                group = self._parallel.groups.of(bucket.ranks)
                for owner, parameters in share.items():
                    for piece in messages(parameters):
                        row = packed_gradients(piece)
                        distributed.reduce(row, owner, group=group)
                        if owner == self._parallel.layout.rank:
                            unpack_gradients(piece, row)
                        else:
                            for _, parameter in piece:
                                parameter.grad = None

    def clip(self, limit: float) -> GradientNorm:
        """Scale the gradients down to a global L2 norm of `limit`; leave them if the norm is not finite."""
        return clip(self._owned, self._owned, limit, self._parallel)

    def gather(self) -> None:
        """Give every holder what the owners stepped."""
        for bucket, share in self._shares:
            if len(bucket.ranks) > 1:
                group = self._parallel.groups.of(bucket.ranks)
                for owner, parameters in share.items():
                    for piece in messages(parameters):
                        broadcast(piece, owner, group)


def shares(bucket: Bucket) -> Mapping[int, list[Named]]:
    """Return which holder owns which parameters: the largest first, each to whom has least so far."""
    found: dict[int, list[Named]] = {rank: [] for rank in bucket.ranks}
    sizes = dict.fromkeys(bucket.ranks, 0)
    for named in sorted(bucket.parameters, key=lambda named: -named[1].numel()):
        rank = min(sizes, key=lambda rank: sizes[rank])
        found[rank].append(named)
        sizes[rank] += named[1].numel()
    return found

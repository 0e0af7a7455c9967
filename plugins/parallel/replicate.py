"""Every holder of a parameter keeps all of it."""

from collections.abc import Mapping, Sequence

from attrs import frozen
from torch import nn

from tangram.core.context import Parallel
from tangram.core.contracts import Sharding
from tangram.core.model import Model
from tangram.core.records import GradientNorm
from tangram.core.registry import component
from tangram.plugins.parallel.holders import (
    Bucket,
    buckets,
    clip,
    messages,
    packed_gradients,
    rows_of,
    unpack_gradients,
)


@component("sharding", use="replicate", capabilities=["ranks"])
@frozen(kw_only=True)
class ReplicateConfig:
    """Keep every parameter, gradient and optimizer state on every rank that works with it."""

    def build(self, parallel: Parallel) -> Sharding:
        """Build it."""
        return Replicate(parallel)


class Replicate:
    """Whole parameters; on one rank there is nothing to reduce or gather."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._buckets: list[Bucket] = []
        self._parameters: list[tuple[str, nn.Parameter]] = []
        self._rows: Mapping[str, range] = {}

    def attach(self, model: Model) -> Sequence[tuple[str, nn.Parameter]]:
        """Return the model's parameters with their addresses."""
        self._buckets, self._parameters = buckets(model, self._parallel), list(model.named_parameters())
        self._rows = rows_of(model, self._parallel)
        return self._parameters

    def owned(self) -> frozenset[str]:
        """Return the addresses of which this rank is the first holder."""
        return frozenset(address for address, _ in self._counted())

    def _counted(self) -> list[tuple[str, nn.Parameter]]:
        rank = self._parallel.layout.rank
        return [named for bucket in self._buckets if bucket.ranks[0] == rank for named in bucket.parameters]

    def rows(self) -> Mapping[str, range]:
        """Return the rank's share of the experts."""
        return self._rows

    def reduce(self) -> None:
        """Sum the gradients over their holders, in float32."""
        for bucket in self._buckets:
            if len(bucket.ranks) > 1:
                for piece in messages(bucket.parameters):
                    unpack_gradients(piece, self._parallel.groups.sum(packed_gradients(piece), bucket.ranks))

    def clip(self, limit: float) -> GradientNorm:
        """Scale the gradients down to a global L2 norm of `limit`; leave them if the norm is not finite."""
        return clip(self._counted(), self._parameters, limit, self._parallel)

    def gather(self) -> None:
        """Do nothing: every holder stepped its copy alike."""

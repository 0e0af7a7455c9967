"""Who holds what: the ranks of a run, and which of them have a given piece of the model. Pure Python, no torch.

Ranks are numbered by pipeline rank, then by data rank: those that hold the same stages and see different data are
neighbours, and so are those that share out the experts of a layer.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType

from attrs import field, frozen

_ALONE: Mapping[tuple[int, int], int] = MappingProxyType({(0, 0): 0})


@frozen
class Layout:
    """The ranks of a run, and which of them this is.

    Attributes:
        place: The pipeline rank of each (flow, stage), as the plan has it.
        data_ranks: Ranks with the same stages, each with other rows of the batch.
        expert_ranks: Neighbouring data ranks that share out the experts of each layer.
        rank: Which rank this is.

    Raises:
        ValueError: The data ranks are no multiple of the expert ranks, or the rank is none of them.
    """

    place: Mapping[tuple[int, int], int] = field(default=_ALONE)
    data_ranks: int = 1
    expert_ranks: int = 1
    rank: int = 0

    def __attrs_post_init__(self) -> None:
        if self.data_ranks % self.expert_ranks:
            raise ValueError(f"{self.data_ranks} data ranks are no multiple of {self.expert_ranks} expert ranks")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"there is no rank {self.rank} of {self.ranks}")

    @property
    def n_stages(self) -> int:
        """Slices of the layers."""
        return max(stage for _, stage in self.place) + 1

    @property
    def pipeline_ranks(self) -> int:
        """Ranks that share out the stages."""
        return max(self.place.values()) + 1

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.pipeline_ranks * self.data_ranks

    @property
    def pipeline_rank(self) -> int:
        """Where in the pipeline this rank is."""
        return self.rank // self.data_ranks

    @property
    def data_rank(self) -> int:
        """Which rows of the batch this rank sees."""
        return self.rank % self.data_ranks

    @property
    def expert_rank(self) -> int:
        """Which share of the experts this rank holds."""
        return self.data_rank % self.expert_ranks

    @property
    def stages(self) -> frozenset[int]:
        """The stages that this rank holds, of all flows."""
        return frozenset(stage for (_, stage), rank in self.place.items() if rank == self.pipeline_rank)

    @property
    def experts(self) -> tuple[int, ...]:
        """The ranks that share out experts with this one, itself among them, in order."""
        first = self.rank - self.expert_rank
        return tuple(range(first, first + self.expert_ranks))

    @property
    def pipeline(self) -> tuple[int, ...]:
        """The ranks of this one's pipeline, itself among them, in order."""
        return tuple(self.at(rank) for rank in range(self.pipeline_ranks))

    def at(self, pipeline_rank: int) -> int:
        """Return the rank that is elsewhere in the pipeline and sees the same data."""
        return pipeline_rank * self.data_ranks + self.data_rank

    def share(self, n_experts: int) -> range:
        """Return which of a layer's experts this rank holds.

        Raises:
            ValueError: They cannot be shared out evenly.
        """
        size, rest = divmod(n_experts, self.expert_ranks)
        if rest:
            raise ValueError(f"{n_experts} experts cannot be shared out evenly among {self.expert_ranks} expert ranks")
        return range(self.expert_rank * size, (self.expert_rank + 1) * size)

    def holders(self, stages: Collection[int], expert: bool) -> tuple[int, ...]:
        """Return the ranks that hold a parameter of these stages, in order.

        Args:
            stages: Those that use it: several where it is tied.
            expert: Whether it belongs to experts; then only ranks with this one's share of them hold it.
        """
        pipeline = sorted({rank for (_, stage), rank in self.place.items() if stage in stages})
        data = range(self.expert_rank, self.data_ranks, self.expert_ranks) if expert else range(self.data_ranks)
        return tuple(place * self.data_ranks + each for place in pipeline for each in data)

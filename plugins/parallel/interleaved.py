"""Several smaller stages on each rank (arXiv:2104.04473, section 2.2)."""

from attrs import field, frozen
from attrs.validators import gt

from tangram.core.contracts import Pipeline, Promise
from tangram.core.plan import Action, Op, Plan, Slot, in_turn
from tangram.core.registry import component
from tangram.core.simulator import Costs


@component("pipeline", use="interleaved")
@frozen(kw_only=True)
class InterleavedConfig:
    """One forward, one backward over stages that go round the ranks more than once.

    Attributes:
        rounds: Stages of each rank.
    """

    rounds: int = field(default=2, validator=gt(0))

    def build(self) -> Pipeline:
        """Build it."""
        return Interleaved(self.rounds)


class Interleaved:
    """A bubble as long as that of 1F1B over stages that are as many times shorter."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        """Return the plan.

        Raises:
            ValueError: The micro-batches do not come in groups of one for each rank.
        """
        if ranks < 1 or microbatches < 1 or microbatches % ranks:
            raise ValueError(
                f"interleaved passes micro-batches in groups of one for each rank: {microbatches} of them do not make "
                f"groups of {ranks}"
            )
        group, total = ranks * self.rounds, microbatches * self.rounds

        def slot(rank: int, number: int, backward: bool) -> Slot:
            turn, inside = divmod(number, group)
            lap = inside // ranks
            stage = (self.rounds - 1 - lap if backward else lap) * ranks + rank
            return Slot(0, stage, turn * ranks + inside % ranks)

        actions = []
        for rank in range(ranks):
            forward, backward = (
                [Action(op, slot(rank, number, op is Op.BACKWARD)) for number in range(total)]
                for op in (Op.FORWARD, Op.BACKWARD)
            )
            actions.append(tuple(in_turn(self._ahead(ranks, rank), forward, [[action] for action in backward])))
        place = {(0, stage): stage % ranks for stage in range(group)}
        return Plan(stages=group, microbatches=(microbatches,), place=place, actions=tuple(actions))

    def _ahead(self, ranks: int, rank: int) -> int:
        """Return after how many forwards a rank first goes backward."""
        if self.rounds == 1:
            return ranks - 1 - rank
        return 2 * (ranks - 1 - rank) + (self.rounds - 1) * ranks

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        """Return (P - 1)(F + B) of a stage, and the live stages of the first rank."""
        return Promise(costs.fill(ranks), min(self._ahead(ranks, 0) + 1, microbatches * self.rounds))

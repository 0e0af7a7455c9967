"""One forward, one backward (arXiv:1806.03377; without flushes between steps arXiv:2104.04473)."""

from attrs import frozen

from tangram.core.contracts import Pipeline, Promise
from tangram.core.plan import Action, Op, Plan, Slot, in_turn, one_stage_a_rank
from tangram.core.registry import component
from tangram.core.simulator import Costs


@component("pipeline", use="one_f_one_b")
@frozen(kw_only=True)
class OneFOneBConfig:
    """After as many forwards as there are ranks behind, one forward and one backward in turn."""

    def build(self) -> Pipeline:
        """Build it."""
        return OneFOneB()


class OneFOneB:
    """One stage a rank, no more live micro-batches than ranks."""

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        """Return the plan.

        Raises:
            ValueError: There is no rank or no micro-batch.
        """

        def order(rank: int) -> list[Action]:
            slots = [Slot(0, rank, microbatch) for microbatch in range(microbatches)]
            forward = [Action(Op.FORWARD, slot) for slot in slots]
            return in_turn(ranks - 1 - rank, forward, [[Action(Op.BACKWARD, slot)] for slot in slots])

        return one_stage_a_rank(ranks, microbatches, order)

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        """Return (P - 1)(F + B), and a live micro-batch for each rank."""
        return Promise(costs.fill(ranks), min(ranks, microbatches))

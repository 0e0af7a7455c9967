"""One forward, one backward (arXiv:1806.03377; without flushes between steps arXiv:2104.04473)."""

from attrs import frozen

from tangram.core.contracts import Pipeline, Promise
from tangram.core.plan import Action, Op, Plan, Slot, one_stage_a_rank
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
            ahead = min(ranks - 1 - rank, microbatches)
            forward = [Action(Op.FORWARD, Slot(0, rank, microbatch)) for microbatch in range(microbatches)]
            actions = forward[:ahead]
            for microbatch in range(microbatches):
                actions += forward[ahead + microbatch : ahead + microbatch + 1]
                actions.append(Action(Op.BACKWARD, Slot(0, rank, microbatch)))
            return actions

        return one_stage_a_rank(ranks, microbatches, order)

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        """Return (P - 1)(F + B), and a live micro-batch for each rank."""
        bubble = (ranks - 1) * (costs.forward + costs.backward)
        return Promise(None if costs.latency else bubble, min(ranks, microbatches))

"""All micro-batches forward, then all backward (GPipe, arXiv:1811.06965)."""

from attrs import frozen

from tangram.core.contracts import Pipeline, Promise
from tangram.core.plan import Action, Op, Plan, Slot, one_stage_a_rank
from tangram.core.registry import component
from tangram.core.simulator import Costs


@component("pipeline", use="gpipe")
@frozen(kw_only=True)
class GPipeConfig:
    """All micro-batches forward, then all backward; the activations of all are alive at once."""

    def build(self) -> Pipeline:
        """Build it."""
        return GPipe()


class GPipe:
    """One stage a rank."""

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        """Return the plan.

        Raises:
            ValueError: There is no rank or no micro-batch.
        """

        def order(rank: int) -> list[Action]:
            slots = [Slot(0, rank, microbatch) for microbatch in range(microbatches)]
            return [Action(op, slot) for op in (Op.FORWARD, Op.BACKWARD) for slot in slots]

        return one_stage_a_rank(ranks, microbatches, order)

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        """Return (P - 1)(F + B), and as many live micro-batches as there are."""
        return Promise(costs.fill(ranks), microbatches)

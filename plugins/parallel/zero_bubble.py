"""The gradients of weights fill the bubbles: ZB1P of zero-bubble pipelines (ZB-H1 of arXiv:2401.10241)."""

from attrs import frozen

from tangram.core.contracts import Pipeline, Promise
from tangram.core.plan import Action, Op, Plan, Slot, in_turn, one_stage_a_rank
from tangram.core.registry import component
from tangram.core.simulator import Costs


@component("pipeline", use="zero_bubble")
@frozen(kw_only=True)
class ZeroBubbleConfig:
    """One forward, one backward, the weights' half of which waits: a micro-batch longer on each further rank."""

    def build(self) -> Pipeline:
        """Build it."""
        return ZeroBubble()


class ZeroBubble:
    """One stage a rank; as much memory as 1F1B."""

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        """Return the plan.

        Raises:
            ValueError: There is no rank or no micro-batch.
        """

        def order(rank: int) -> list[Action]:
            forward, input, weight = (
                [Action(op, Slot(0, rank, microbatch)) for microbatch in range(microbatches)]
                for op in (Op.FORWARD, Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD)
            )
            late = [*([] for _ in range(rank)), *([action] for action in weight)]  # each `rank` micro-batches later
            backward = [[action, *then] for action, then in zip(input, late, strict=False)]
            return in_turn(ranks - 1 - rank, forward, backward) + weight[max(0, microbatches - rank) :]

        return one_stage_a_rank(ranks, microbatches, order)

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        """Return (P - 1)(F + B - 2W), which holds where W is no longer than F and I, and a live one for each rank."""
        holds = costs.weight <= min(costs.forward, costs.input) and microbatches >= ranks and not costs.latency
        bubble = (ranks - 1) * (costs.forward + costs.backward - 2 * costs.weight)
        return Promise(bubble if holds else None, min(ranks, microbatches))

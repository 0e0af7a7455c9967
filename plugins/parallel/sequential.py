"""The pipeline of one rank."""

from attrs import frozen

from tangram.core.contracts import Pipeline, Promise
from tangram.core.plan import Plan, sequential
from tangram.core.registry import component
from tangram.core.simulator import Costs


@component("pipeline", use="sequential")
@frozen(kw_only=True)
class SequentialConfig:
    """One rank works each micro-batch forward, then backward."""

    def build(self) -> Pipeline:
        """Build it."""
        return Sequential()


class Sequential:
    """Forward, backward, next."""

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        """Return the plan.

        Raises:
            ValueError: There is more than one rank.
        """
        if ranks != 1:
            raise ValueError(f"sequential runs on one pipeline rank, not {ranks}")
        return sequential(microbatches)

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        """Return that it never waits, and that one micro-batch is alive."""
        return Promise(0.0, 1)

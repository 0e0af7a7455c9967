"""Guards: what to do with a step whose loss or gradient is not finite."""

from attrs import field, frozen
from attrs.validators import gt

from tangram.core.contracts import Guard, NonFiniteError, State
from tangram.core.records import GradientNorm, Result, Verdict, culprit_of
from tangram.core.registry import component


@component("guard", use="raise")
@frozen(kw_only=True)
class RaiseConfig:
    """Stop the run before the update."""

    def build(self) -> Guard:
        """Build it."""
        return Raise()


class Raise:
    """Stops the run."""

    def judge(self, result: Result, norm: GradientNorm) -> Verdict:
        """Return ACCEPT.

        Raises:
            NonFiniteError: A loss or gradient is not finite.
        """
        culprit = culprit_of(result, norm)
        if culprit:
            raise NonFiniteError(culprit)
        return Verdict.ACCEPT


@component("guard", use="skip")
@frozen(kw_only=True)
class SkipConfig:
    """Leave out the update of a bad step; stop when too many come in a row.

    Attributes:
        limit: Bad steps in a row at which the run stops.
    """

    limit: int = field(default=10, validator=gt(0))

    def build(self) -> Guard:
        """Build it."""
        return Skip(self.limit)


class Skip:
    """Skips bad steps. Stateful: the count of bad steps in a row survives a crash."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row = limit, 0

    def judge(self, result: Result, norm: GradientNorm) -> Verdict:
        """Return ACCEPT, or SKIP for a bad step.

        Raises:
            NonFiniteError: This is bad step number `limit` in a row.
        """
        culprit = culprit_of(result, norm)
        self.in_a_row = self.in_a_row + 1 if culprit else 0
        if self.in_a_row >= self.limit:
            raise NonFiniteError(f"{culprit}; {self.in_a_row} such steps in a row")
        return Verdict.SKIP if culprit else Verdict.ACCEPT

    def state(self) -> State:
        """Return the count."""
        return {"in_a_row": self.in_a_row}

    def load_state(self, state: State) -> None:
        """Take the count back."""
        self.in_a_row = int(state["in_a_row"])

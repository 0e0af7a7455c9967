"""Guards: what to do with a step whose loss or gradient is not finite, or whose loss jumps."""

import math

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

    rolls_back = False

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

    rolls_back = False

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


@component("guard", use="rollback")
@frozen(kw_only=True)
class RollbackConfig:
    """Go back to the last checkpoint and leave out the batch of a step that is not finite or whose loss spikes.

    Attributes:
        spike: Standard deviations above its moving average past which the total loss is a spike.
        window: Accepted steps over which the average and the deviation are taken, equally at first and then
            exponentially; none is called a spike before there were so many.
        limit: Rollbacks of a run; the next bad step stops it.
    """

    spike: float = field(default=6.0, validator=gt(0.0))
    window: int = field(default=128, validator=gt(1))
    limit: int = field(default=3, validator=gt(0))

    def build(self) -> Guard:
        """Build it."""
        return Rollback(self)


class Rollback:
    """Asks for rollbacks. Stateful: the average of the loss goes back with the weights, the count never does."""

    rolls_back = True

    def __init__(self, config: RollbackConfig) -> None:
        self.config = config
        self.seen, self.mean, self.variance, self.rollbacks = 0, 0.0, 0.0, 0

    def judge(self, result: Result, norm: GradientNorm) -> Verdict:
        """Return ACCEPT, or ROLLBACK for a bad step.

        Raises:
            NonFiniteError: The step is bad, and the run has had all its rollbacks.
        """
        culprit = culprit_of(result, norm) or self._spike(result.total)
        if not culprit:
            self._take_in(result.total)
            return Verdict.ACCEPT
        if self.rollbacks >= self.config.limit:
            raise NonFiniteError(f"{culprit}; the run was rolled back {self.rollbacks} times already")
        self.rollbacks += 1
        return Verdict.ROLLBACK

    def _spike(self, total: float) -> str:
        bound = self.mean + self.config.spike * math.sqrt(self.variance)
        if self.seen < self.config.window or total <= bound:
            return ""
        return f"the loss rose to {total:.4g}, past {bound:.4g} (average {self.mean:.4g})"

    def _take_in(self, total: float) -> None:
        self.seen = min(self.seen + 1, self.config.window)
        share, rise = 1 / self.seen, total - self.mean
        self.mean += share * rise
        self.variance = (1 - share) * (self.variance + share * rise**2)

    def state(self) -> State:
        """Return the moving average and the count."""
        return {"seen": self.seen, "mean": self.mean, "variance": self.variance, "rollbacks": self.rollbacks}

    def load_state(self, state: State) -> None:
        """Take the average back; the count too, but a rollback loads an older one, which is not."""
        self.seen, self.mean, self.variance = int(state["seen"]), float(state["mean"]), float(state["variance"])
        self.rollbacks = max(self.rollbacks, int(state["rollbacks"]))

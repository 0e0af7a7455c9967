"""What every guard owes: it lets good steps through and never a bad one, and judges on as before after a crash."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from attrs import frozen
from hypothesis import strategies as st

from tangram.core import checkpoint
from tangram.core.contracts import Guard, NonFiniteError, Stateful
from tangram.core.records import GradientNorm, Result, Verdict
from tangram.testing.laws import Contract, law
from tangram.testing.mutants import guard as mutants


@frozen
class Step:
    """What a guard sees of a step.

    Attributes:
        losses: Losses by name.
        norm: The gradient norm; one that is not finite names a gradient.
    """

    losses: Mapping[str, float]
    norm: float = 1.0

    def judged_by(self, guard: Guard, device: str) -> str:
        """Return the verdict, or that it stops the run; a guard that asks for a rollback said that it may."""
        result = Result(self.losses, sum(self.losses.values()), torch.zeros(1, 1, dtype=torch.int64, device=device), 1)
        broken = () if math.isfinite(self.norm) else ("blocks.0.attention.out.weight",)
        try:
            verdict = guard.judge(result, GradientNorm(self.norm, broken))
        except NonFiniteError as error:
            if not str(error):
                raise AssertionError("it stops the run and does not say why") from error
            return "stop"
        assert verdict is not Verdict.ROLLBACK or guard.rolls_back, "it asks for a rollback, and rolls_back is False"
        return verdict.value


_BAD = st.sampled_from((math.nan, math.inf, -math.inf))
_FALLING = st.lists(st.floats(0.1, 20.0), min_size=3, max_size=6).map(lambda losses: sorted(losses, reverse=True))
_BROKEN = st.one_of(
    st.builds(lambda value: Step({"next_token": 2.0, "mtp": value}), _BAD),
    st.builds(lambda norm: Step({"next_token": 2.0, "mtp": 3.0}, norm), st.sampled_from((math.nan, math.inf))),
)
_STEPS = st.lists(st.floats(0.1, 20.0).map(lambda loss: Step({"next_token": loss})) | _BROKEN, max_size=8)


class GuardContract(Contract):
    """The laws of the slot `guard`."""

    slot = "guard"
    optional: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def make(cls, config: Any) -> Guard:
        """Return what the config builds."""
        guard: Guard = config.build()
        return guard

    @law(losses=_FALLING, kills=[mutants.skips_good_steps])
    def an_ordinary_step_is_accepted(self, config: Any, losses: list[float]) -> None:
        """Steps that are finite, whose loss does not rise and whose gradient stays, are accepted."""
        guard = self.make(config)
        for loss in losses:
            verdict = Step({"next_token": loss}).judged_by(guard, self.device)
            assert verdict == Verdict.ACCEPT.value, f"it answers a loss of {loss} by {verdict}"

    @law(
        losses=_FALLING,
        value=_BAD,
        kills=[mutants.accepts_nan, mutants.looks_at_losses_alone, mutants.rolls_back_unannounced],
    )
    def what_is_not_finite_is_never_accepted(self, config: Any, losses: list[float], value: float) -> None:
        """A loss or gradient norm that is not finite is skipped, rolled back or stops the run, early and late."""
        good = {"next_token": losses[-1], "mtp": losses[-1]}
        for broken in (Step(good | {"next_token": value}), Step(good | {"mtp": value}), Step(good, abs(value))):
            for before in ([], losses):
                guard = self.make(config)
                for loss in before:
                    Step({"next_token": loss, "mtp": loss}).judged_by(guard, self.device)
                assert broken.judged_by(guard, self.device) != Verdict.ACCEPT.value, f"it accepts {broken}"

    @law(steps=_STEPS, kills=[mutants.forgets_its_count])
    def resumed_anywhere_its_verdicts_are_the_same(self, config: Any, steps: list[Step]) -> None:
        """The same steps have the same verdicts, also of a guard that a checkpoint brings back in their midst."""
        worse = [*steps, *[Step({"next_token": math.nan})] * 4]
        expected = self._verdicts(self.make(config), worse)
        for cut in range(len(expected)):
            first, second = self.make(config), self.make(config)
            before = self._verdicts(first, worse[:cut])
            assert isinstance(first, Stateful) == isinstance(second, Stateful)
            if isinstance(first, Stateful) and isinstance(second, Stateful):
                with TemporaryDirectory() as folder:
                    saved = checkpoint.save(Path(folder), 0, {"guard": first.state()}, {})
                    second.load_state(checkpoint.read_file(saved, "guard"))
            assert [*before, *self._verdicts(second, worse[cut:])] == expected, f"resumed after {cut} it judges anew"

    def _verdicts(self, guard: Guard, steps: Sequence[Step]) -> list[str]:
        """Return the verdicts up to the one that stops the run."""
        found: list[str] = []
        for step in steps:
            found.append(step.judged_by(guard, self.device))
            if found[-1] == "stop":
                break
        return found

"""Guards with one known fault each."""

from typing import Any

from tangram.core.records import GradientNorm, Result, Verdict


def accepts_nan(guard: Any) -> Any:
    """Whatever the step is, it is accepted."""
    guard.judge = lambda result, norm: Verdict.ACCEPT
    return guard


def looks_at_losses_alone(guard: Any) -> Any:
    """Losses are looked at and gradients are not."""
    judge = guard.judge
    guard.judge = lambda result, norm: judge(result, GradientNorm(1.0))
    return guard


def skips_good_steps(guard: Any) -> Any:
    """Now and then an ordinary step is left out."""
    judge, seen = guard.judge, list[None]()

    def judging(result: Result, norm: GradientNorm) -> Verdict:
        seen.append(None)
        return Verdict.SKIP if len(seen) % 3 == 0 else judge(result, norm)

    guard.judge = judging
    return guard


def rolls_back_unannounced(guard: Any) -> Any:
    """It asks for a rollback and did not say that it may, so that there is no checkpoint to go back to."""
    judge = guard.judge

    def judging(result: Result, norm: GradientNorm) -> Verdict:
        return Verdict.ACCEPT if judge(result, norm) is Verdict.ACCEPT else Verdict.ROLLBACK

    guard.judge, guard.rolls_back = judging, False
    return guard


def forgets_its_count(guard: Any) -> Any:
    """What it has seen is lost on resume."""
    guard.load_state = lambda state: None
    return guard

"""Guards: every number that is not finite is caught, named, and answered as the guard promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.contracts import Guard, NonFiniteError
from tangram.core.records import GradientNorm, Result, Verdict
from tangram.plugins.training.guards import RaiseConfig, RollbackConfig, SkipConfig

BAD = st.sampled_from((math.nan, math.inf, -math.inf))
NORM = GradientNorm(1.0)


def result(**losses: float) -> Result:
    return Result(losses=losses, total=sum(losses.values()), load=torch.zeros(1, 1), peak_live=1)


GOOD = result(next_token=2.0, mtp=3.0)


def bad(guard: Guard, **losses: float) -> Verdict:
    return guard.judge(result(**(losses or {"next_token": math.nan})), NORM)


@given(value=BAD, name=st.sampled_from(("next_token", "mtp", "sequence_balance")))
def test_a_loss_that_is_not_finite_is_named_with_its_value(value, name):
    losses = {"next_token": 2.0, "mtp": 3.0, "sequence_balance": 1.0, name: value}
    with pytest.raises(NonFiniteError, match=f"loss {name} is {value}"):
        RaiseConfig().build().judge(result(**losses), NORM)
    assert SkipConfig().build().judge(result(**losses), NORM) is Verdict.SKIP


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (
            GradientNorm(math.nan, ("blocks.1.out.weight",)),
            "the gradient of blocks.1.out.weight is not finite",
        ),
        (
            GradientNorm(math.inf, ("a.weight", "b.weight", "c.weight")),
            "gradient of a.weight and 2 more is not",
        ),
        (GradientNorm(math.inf), "the gradient norm is inf"),
        (GradientNorm(math.nan), "the gradient norm is nan"),
    ],
)
def test_a_gradient_that_is_not_finite_is_named(norm, message):
    with pytest.raises(NonFiniteError, match=message):
        RaiseConfig().build().judge(GOOD, norm)
    assert SkipConfig().build().judge(GOOD, norm) is Verdict.SKIP


@given(limit=st.integers(1, 5), before=st.integers(0, 4))
def test_so_many_bad_steps_in_a_row_stop_the_run_and_a_good_one_starts_the_count_anew(limit, before):
    guard = SkipConfig(limit=limit).build()
    for _ in range(min(before, limit - 1)):
        assert bad(guard) is Verdict.SKIP
    assert guard.judge(GOOD, NORM) is Verdict.ACCEPT
    for _ in range(limit - 1):
        assert bad(guard) is Verdict.SKIP
    with pytest.raises(NonFiniteError, match=f"loss next_token is nan; {limit} such steps in a row"):
        bad(guard)


def test_a_limit_that_skips_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match="limit"):
        SkipConfig(limit=0)


def noisy(n: int, seed: int = 0) -> list[float]:
    """Return losses around 3 with deviation 0.1."""
    return (3 + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).tolist()


@pytest.mark.parametrize(
    ("height", "verdict"), [(0.3, Verdict.ACCEPT), (1.2, Verdict.ROLLBACK), (-2.0, Verdict.ACCEPT)]
)
def test_a_loss_far_above_its_average_is_a_spike_and_one_far_below_is_none(height, verdict):
    guard = RollbackConfig(spike=6.0, window=50).build()
    assert {guard.judge(result(next_token=loss), NORM) for loss in noisy(300)} == {Verdict.ACCEPT}
    before = guard.state()
    assert guard.judge(result(next_token=3 + height), NORM) is verdict
    if verdict is Verdict.ROLLBACK:  # and it is not taken into the average
        assert {**guard.state(), "rollbacks": 0} == before


def test_nothing_is_a_spike_before_the_window_is_full_but_what_is_not_finite_is_bad_at_once():
    guard = RollbackConfig(window=50).build()
    losses = [*noisy(48), 9.0]
    assert {guard.judge(result(next_token=loss), NORM) for loss in losses} == {Verdict.ACCEPT}
    assert bad(RollbackConfig(window=50).build()) is Verdict.ROLLBACK
    assert guard.judge(GOOD, GradientNorm(math.inf)) is Verdict.ROLLBACK


@given(seed=st.integers(0, 99), window=st.integers(2, 40))
def test_a_full_window_has_the_mean_and_variance_of_its_losses(seed, window):
    guard, losses = RollbackConfig(window=window, spike=1e9).build(), noisy(window, seed)
    for loss in losses:
        guard.judge(result(next_token=loss), NORM)
    values = torch.tensor(losses, dtype=torch.float64)
    assert guard.state()["mean"] == pytest.approx(float(values.mean()), rel=1e-12)
    assert guard.state()["variance"] == pytest.approx(float(values.var(correction=0)), rel=1e-9)


@given(limit=st.integers(1, 4))
def test_a_run_has_so_many_rollbacks_even_if_an_older_state_is_loaded_after_each(limit):
    guard = RollbackConfig(limit=limit).build()
    start = guard.state()
    for _ in range(limit):
        assert bad(guard) is Verdict.ROLLBACK
        guard.load_state(start)
    resumed = RollbackConfig(limit=limit).build()
    resumed.load_state(guard.state())
    for stopped in (guard, resumed):
        with pytest.raises(NonFiniteError, match=f"loss next_token is nan; .* rolled back {limit} times already"):
            bad(stopped)


def test_only_the_guard_that_rolls_back_says_that_it_may():
    assert [config.build().rolls_back for config in (RaiseConfig(), SkipConfig(), RollbackConfig())] == [
        False,
        False,
        True,
    ]

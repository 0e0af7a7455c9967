"""Guards: every number that is not finite is caught, named, and answered as the guard promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.contracts import Guard, NonFiniteError, Stateful
from tangram.core.records import GradientNorm, Result, Verdict
from tangram.plugins.training.guards import RaiseConfig, SkipConfig

BAD = st.sampled_from((math.nan, math.inf, -math.inf))
NORM = GradientNorm(1.0)


def result(**losses: float) -> Result:
    return Result(losses=losses, total=sum(losses.values()), load=torch.zeros(1, 1), peak_live=1)


GOOD = result(next_token=2.0, mtp=3.0)


def bad(guard: Guard, **losses: float) -> Verdict:
    return guard.judge(result(**(losses or {"next_token": math.nan})), NORM)


@pytest.mark.parametrize("config", [RaiseConfig(), SkipConfig()])
def test_finite_numbers_are_accepted(config):
    assert config.build().judge(GOOD, GradientNorm(1e30)) is Verdict.ACCEPT


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


@given(limit=st.integers(2, 5), data=st.data())
def test_the_count_survives_a_crash(limit, data):
    guard, after = SkipConfig(limit=limit).build(), SkipConfig(limit=limit).build()
    skipped = data.draw(st.integers(0, limit - 1))
    for _ in range(skipped):
        bad(guard)
    assert isinstance(guard, Stateful)
    assert isinstance(after, Stateful)
    after.load_state(guard.state())
    assert after.state() == guard.state()
    for _ in range(limit - 1 - skipped):
        assert bad(after) is Verdict.SKIP
    with pytest.raises(NonFiniteError):
        bad(after)


def test_a_limit_that_skips_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match="limit"):
        SkipConfig(limit=0)

"""The pipeline of one rank: forward, backward, next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.plan import Op, validate
from tangram.plugins.parallel.sequential import SequentialConfig


@given(microbatches=st.integers(1, 40))
def test_each_micro_batch_goes_forward_and_then_backward_before_the_next(microbatches):
    plan = SequentialConfig().build().schedule(1, microbatches)
    validate(plan)
    (actions,) = plan.actions
    assert [action.op for action in actions] == [Op.FORWARD, Op.BACKWARD] * microbatches
    assert [plan.index(action.slot) for action in actions] == [i for i in range(microbatches) for _ in range(2)]
    assert (plan.ranks, plan.stages, plan.trains) == (1, 1, True)


@pytest.mark.parametrize("ranks", [0, 2, 16])
def test_more_than_one_rank_is_refused_with_their_number(ranks):
    with pytest.raises(ValueError, match=f"one pipeline rank, not {ranks}"):
        SequentialConfig().build().schedule(ranks, 4)

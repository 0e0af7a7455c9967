"""A timeline obeys the plan: nothing before what it needs, nothing beside what its rank does."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import plans

from tangram.core.gantt import lines, picture
from tangram.core.plan import Action, Op, Plan, PlanError, Slot
from tangram.core.simulator import Costs, needs, simulate
from tangram.plugins.parallel.dualpipe import DualPipe

TIMES = st.sampled_from((0.25, 0.5, 1.0, 1.75))


COSTS = st.builds(
    Costs, forward=TIMES, input=TIMES, weight=TIMES, overlap=st.none() | TIMES, latency=st.just(0) | TIMES
)


@given(plan=plans(), costs=COSTS)
def test_nothing_begins_before_what_it_needs_has_ended(plan, costs):
    timeline = simulate(plan, costs)
    ended = {part: span.end for rank in timeline.spans for span in rank for part in span.action.parts}
    for rank, spans in enumerate(timeline.spans):
        assert [span.action for span in spans] == list(plan.actions[rank])
        for before, after in pairwise(spans):
            assert after.start >= before.end
        for span in spans:
            assert span.end - span.start == pytest.approx(costs.of(span.action))
            for need in (need for part in span.action.parts for need in needs(plan, part)):
                whole = Action(Op.BACKWARD, need.slot)
                end = ended[whole if need.op is Op.INPUT_BACKWARD and whole in ended else need]
                far = plan.place[need.slot.flow, need.slot.stage] != rank
                assert span.start >= end + costs.latency * far


@given(plan=plans(), costs=COSTS)
def test_every_action_begins_as_soon_as_it_can(plan, costs):
    timeline = simulate(plan, costs)
    assert timeline.makespan >= max(sum(costs.of(action) for action in rank) for rank in plan.actions)
    for rank in timeline.spans:
        starts = [0.0, *(span.end for other in timeline.spans for span in other)]
        for span in rank:
            assert any(span.start in (end, end + costs.latency) for end in starts)


@given(plan=plans(), costs=COSTS)
def test_busy_and_idle_make_up_the_step(plan, costs):
    timeline = simulate(plan, costs)
    for rank, idle in enumerate(timeline.bubble):
        busy = sum(costs.of(action) for action in plan.actions[rank])
        assert busy + idle == pytest.approx(timeline.makespan)
        assert idle >= -1e-9


def test_ranks_that_wait_for_each_other_are_told():
    first, last = (
        (Action(Op.BACKWARD, Slot(0, 0, 0)), Action(Op.FORWARD, Slot(0, 0, 0))),
        (Action(Op.FORWARD, Slot(0, 1, 0)), Action(Op.BACKWARD, Slot(0, 1, 0))),
    )
    plan = Plan(2, (1,), {(0, 0): 0, (0, 1): 1}, (first, last))
    with pytest.raises(PlanError, match="every rank waits: the next actions are B>0, F>0"):
        simulate(plan)


@pytest.mark.parametrize(("order", "most"), [("F0 F1 I0 F2 W0 B1 B2", 3), ("F0 F1 I0 W0 F2 B1 B2", 2)])
def test_alive_is_from_the_forward_to_the_last_of_the_backward(order, most):
    ops = {"F": Op.FORWARD, "B": Op.BACKWARD, "I": Op.INPUT_BACKWARD, "W": Op.WEIGHT_BACKWARD}
    actions = tuple(Action(ops[word[0]], Slot(0, 0, int(word[1]))) for word in order.split())
    assert simulate(Plan(1, (3,), {(0, 0): 0}, (actions,))).peak == (most,)


@given(plan=plans(), width=st.integers(20, 200))
def test_a_chart_has_a_line_for_each_rank_and_as_much_idle_time_as_there_is(plan, width):
    timeline = simulate(plan)
    drawn = list(lines(timeline, width))
    assert len(drawn) == plan.ranks
    for line, idle, spans in zip(drawn, timeline.bubble, timeline.spans, strict=True):
        assert len(line) == width + 4
        assert abs(line[4:].count(".") - idle / timeline.makespan * width) <= len(spans)


def test_the_picture_is_the_same_each_time_and_names_what_it_shows():
    plan = DualPipe().schedule(4, 8)
    one, other = (picture(plan, simulate(plan), "dualpipe") for _ in range(2))
    assert one == other
    for word in ("overlapped", "weight gradient", "dualpipe", "rank"):
        assert word in one

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.plan import Action, Op, Plan, PlanError, Slot, forward_only, sequential, split, validate


@given(st.integers(1, 200), st.integers(1, 64))
def test_split_covers_every_layer_once_in_order_with_even_sizes(n_layers: int, n_stages: int) -> None:
    if n_stages > n_layers:
        with pytest.raises(ValueError, match=f"{n_layers} layers do not make {n_stages} stages"):
            split(n_layers, n_stages)
        return
    stages = split(n_layers, n_stages)
    assert [layer for stage in stages for layer in stage] == list(range(n_layers))
    sizes = [len(stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 20))
def test_built_in_plans_are_valid(microbatches: int) -> None:
    for plan in (sequential(microbatches), forward_only({(0, 0): 0}, microbatches)):
        validate(plan)
        assert plan.ranks == 1
    assert sequential(microbatches).trains
    assert not forward_only({(0, 0): 0}, microbatches).trains


def _plan(*actions: Action, microbatches: int = 1) -> Plan:
    return Plan(stages=1, microbatches=(microbatches,), place={(0, 0): 0}, actions=(actions,))


F, B, I, W = Op.FORWARD, Op.BACKWARD, Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD  # noqa: E741
ONE = Slot(0, 0, 0)


@pytest.mark.parametrize(
    ("plan", "fault"),
    [
        (_plan(Action(B, ONE), Action(F, ONE)), "B stands before F"),
        (_plan(Action(F, ONE), Action(W, ONE), Action(I, ONE)), "W stands before I"),
        (_plan(Action(F, ONE), Action(F, ONE), Action(B, ONE)), "done twice"),
        (_plan(Action(F, ONE), Action(I, ONE)), "is worked as"),
        (_plan(Action(F, ONE), Action(B, ONE), Action(W, ONE)), "is worked as"),
        (_plan(Action(F, ONE), Action(B, ONE), microbatches=2), "is worked as"),
        (_plan(Action(F, Slot(0, 1, 0))), "does not exist"),
        (evolve(_plan(Action(F, ONE)), place={(0, 0): 1}), "belongs to rank 1"),
    ],
)
def test_a_faulty_plan_is_refused_and_the_fault_named(plan: Plan, fault: str) -> None:
    with pytest.raises(PlanError, match=fault):
        validate(plan)


def test_micro_batches_are_numbered_through_the_flows() -> None:
    plan = Plan(stages=1, microbatches=(3, 2), place={}, actions=((),))
    assert [plan.index(Slot(0, 0, i)) for i in range(3)] == [0, 1, 2]
    assert [plan.index(Slot(1, 0, i)) for i in range(2)] == [3, 4]


def test_an_action_reads_as_in_the_papers() -> None:
    assert str(Action(F, Slot(0, 0, 7))) == "F>7"
    assert str(Action(B, Slot(1, 0, 3))) == "B<3"

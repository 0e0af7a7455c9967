"""DualPipe's order is its authors', rank by rank; what each schedule costs is what the paper's table says."""

import hashlib

import pytest

from tangram.core.plan import Op, validate
from tangram.core.simulator import Costs, simulate
from tangram.plugins.parallel.dualpipe import DualPipe, DualPipeV
from tangram.plugins.parallel.gpipe import GPipe
from tangram.plugins.parallel.interleaved import Interleaved
from tangram.plugins.parallel.one_f_one_b import OneFOneB
from tangram.plugins.parallel.zero_bubble import ZeroBubble

# SHA-256, first 16 digits, of the order of all ranks. They were taken from github.com/deepseek-ai/DualPipe at 3da1bbe:
# its `step` was run with its computation replaced by a record of what was called, and the records written as a plan's.
ORDERS = {
    (2, 4): "dccd911d1467e37e",
    (2, 20): "d6b0b4f302b96e36",
    (4, 8): "0ae628d923acd8d4",
    (4, 20): "ccb2e99a460587d4",
    (6, 12): "68028cb820979d19",
    (6, 22): "3cd62972bfdbfc34",
    (8, 16): "d740d8bbee2d5e41",
    (8, 20): "e74c9efb5f677e38",
    (8, 40): "89e5d4c7ff661466",
    (16, 32): "06b6b619f01e2a0d",
    (16, 64): "b1aff7e5fe037146",
}
ORDERS_V = {
    (1, 2): "b8f78beebfc97b23",
    (2, 4): "2368ada18e7d7e56",
    (2, 7): "20cb680a52388598",
    (3, 6): "4094f8a53fc972cc",
    (4, 8): "d20e7ae5370c2749",
    (4, 11): "513bf7da073a7fda",
    (8, 16): "813ba7a89538e668",
    (8, 33): "4a549c591c37e015",
}


def digest(plan) -> str:
    order = "\n".join(" ".join(plan.text(rank)) for rank in range(plan.ranks))
    return hashlib.sha256(order.encode()).hexdigest()[:16]


@pytest.mark.parametrize(("ranks", "microbatches"), ORDERS)
def test_the_order_is_the_authors(ranks, microbatches):
    assert digest(DualPipe().schedule(ranks, microbatches)) == ORDERS[ranks, microbatches]


@pytest.mark.parametrize(("ranks", "microbatches"), ORDERS_V)
def test_the_order_of_the_v_is_the_authors(ranks, microbatches):
    assert digest(DualPipeV().schedule(ranks, microbatches)) == ORDERS_V[ranks, microbatches]


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 2), (2, 4), (3, 7), (4, 20), (8, 33)])
def test_the_order_of_the_v_is_torchs(ranks, microbatches):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    if not hasattr(schedules.ScheduleDualPipeV, "_calculate_single_rank_operations"):
        pytest.skip("this torch computes the order elsewhere")
    theirs = object.__new__(schedules.ScheduleDualPipeV)  # its order alone: it asks for processes otherwise
    theirs.pp_group_size, theirs._n_microbatches = ranks, microbatches

    def said(action) -> str:
        if action.sub_actions:
            return "({}+{})".format(*map(said, action.sub_actions))
        op = {"FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FORWARD": "F"}
        return f"{op[action.computation_type.name]}>{action.microbatch_index}@{action.stage_index}"

    plan = DualPipeV().schedule(ranks, microbatches)
    for rank in range(ranks):
        order = theirs._calculate_single_rank_operations(rank)
        assert plan.text(rank) == [said(action) for action in order if action is not None]


def test_the_first_rank_in_words():
    first = DualPipe().schedule(4, 8).text(0)
    assert " ".join(first) == ("F>0 F>1 F>2 F<0 I<0 W<0 F<1 (F>3+B<1) (F<2+B>0) B<2 (F<3+B>1) B<3 I>2 W>2 I>3 W>3")


def test_the_ranks_of_the_second_half_mirror_the_first():
    plan = DualPipe().schedule(8, 20)
    swap = str.maketrans("><", "<>")
    for rank in range(4):
        assert [word.translate(swap) for word in plan.text(rank)] == plan.text(7 - rank)


# The conditions are those under which each closed form was found to hold on a grid; outside them it does not.
UNITS = [(1, 1, 1), (2, 2, 1), (1, 1, 0.5), (3, 3, 2), (1, 1.2, 0.8), (2, 3, 1), (1, 0.8, 0.8), (1, 1, 1.5)]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("share", [1.0, 0.85])
@pytest.mark.parametrize("ranks", [4, 8, 12])
@pytest.mark.parametrize("more", [0, 4, 24])
def test_the_papers_table_of_bubbles_and_memory(unit, share, ranks, more):
    forward, input, weight = unit
    backward, microbatches = input + weight, 2 * ranks + more
    costs = Costs(forward=forward, input=input, weight=weight, overlap=share * (forward + backward))
    found = {
        name: simulate(pipeline.schedule(ranks, microbatches), costs)
        for name, pipeline in (("1F1B", OneFOneB()), ("ZB1P", ZeroBubble()), ("DualPipe", DualPipe()))
    }
    found["DualPipeV"] = simulate(DualPipeV().schedule(ranks // 2, microbatches // 2), costs)
    bubbles = {name: max(timeline.bubble) for name, timeline in found.items()}
    assert bubbles["1F1B"] == pytest.approx((ranks - 1) * (forward + backward))
    if weight <= min(forward, input):
        assert bubbles["ZB1P"] == pytest.approx((ranks - 1) * (forward + backward - 2 * weight))
    if forward == input and weight <= forward:
        wanted = (ranks / 2 - 1) * (costs.pair + backward - 3 * weight)
        assert bubbles["DualPipe"] == pytest.approx(wanted)
        assert bubbles["DualPipeV"] == pytest.approx(wanted)
    assert max(found["1F1B"].peak) == max(found["ZB1P"].peak) == ranks
    assert set(found["DualPipe"].peak) == set(found["DualPipeV"].peak) == {ranks + 1}


def test_the_longest_of_the_ranks_is_promised_and_the_edge_waits_less():
    timeline = simulate(DualPipe().schedule(8, 20), Costs(overlap=2.5))
    assert timeline.bubble == (3.5, 4.0, 4.5, 4.5, 4.5, 4.5, 4.0, 3.5)


def test_more_rounds_make_the_bubble_a_smaller_share():
    shares = []
    for rounds in (1, 2, 4):
        stage = 1 / rounds
        costs = Costs(forward=stage, input=stage, weight=stage)
        shares.append(max(simulate(Interleaved(rounds).schedule(4, 8), costs).bubble))
    assert shares == pytest.approx([9.0, 4.5, 2.25])
    assert simulate(GPipe().schedule(4, 8)).makespan == simulate(Interleaved(1).schedule(4, 8)).makespan


def test_an_overlap_is_a_forward_and_a_whole_backward():
    plan = DualPipe().schedule(4, 8)
    validate(plan)
    pairs = [action for rank in plan.actions for action in rank if action.op is Op.OVERLAP]
    assert pairs
    for pair in pairs:
        forward, backward = pair.parts
        assert (forward.op, backward.op) == (Op.FORWARD, Op.BACKWARD)
        assert forward.slot.flow != backward.slot.flow

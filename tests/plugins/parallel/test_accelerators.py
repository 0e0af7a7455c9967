"""Ranks at accelerators of their own, over a network with NCCL's manners: two steps leave what they leave on a CPU."""

import accelerators_at_work
import pytest
import team_at_work

from tangram.testing import run_ranks

FEW = "train.batch_sequences=4"
ALL_TO_ALL = "model.block.feedforward.dispatcher={use: all_to_all}"
ACROSS = "model.block.feedforward.dispatcher={use: hierarchical, node_ranks: 1}"
BETWEEN = "parallel={pipeline: {use: dualpipe}, pipeline_ranks: 2}"
SHARED_OUT = "parallel={expert_ranks: 2, sharding: {use: zero1}}"
IN_ROWS = "parallel.sharding={use: fsdp}"
ALL = "parallel={pipeline: {use: dualpipev}, pipeline_ranks: 1, expert_ranks: 2, sharding: {use: fsdp}}"


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(2, (FEW, BETWEEN), id="dualpipe"),
        pytest.param(2, (FEW, SHARED_OUT, ALL_TO_ALL), id="experts"),
        pytest.param(2, (FEW, IN_ROWS, "model.recompute=full"), id="fsdp", marks=pytest.mark.soak),
        pytest.param(2, (FEW, ALL, ALL_TO_ALL), id="all", marks=pytest.mark.soak),
        pytest.param(2, (FEW, "parallel.expert_ranks=2", ACROSS), id="two hops", marks=pytest.mark.soak),
        pytest.param(
            4, ("train.batch_sequences=8", BETWEEN, SHARED_OUT, ALL_TO_ALL), id="four", marks=pytest.mark.soak
        ),
    ],
)
def test_ranks_at_accelerators_leave_what_one_leaves_at_a_cpu(ranks: int, overrides: tuple[str, ...]) -> None:
    found = run_ranks(accelerators_at_work.two_steps, ranks, ranks, overrides)
    assert [faults for _, faults in found] == [[]] * ranks
    one = team_at_work.two_steps(
        0, 1, tuple(each for each in overrides if not each.startswith(("parallel", "model.block.")))
    )
    team_at_work.assert_the_steps_of_one(found[0][0], one)

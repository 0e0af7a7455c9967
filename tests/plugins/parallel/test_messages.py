"""Messages over a network that waits as NCCL does and delivers in the order in which was sent."""

import messages_at_work
import pytest
import team_at_work
import torch
from messages_at_work import Left
from pipeline_at_work import PIPELINES

from tangram.testing import RankError, run_ranks

PATIENCE, LITTLE = 60.0, 2.0


def assert_alike(found: list[dict[str, list[Left]]], expected: list[dict[str, list[Left]]]) -> None:
    for rank, (strict, gloo) in enumerate(zip(found, expected, strict=True)):
        assert strict.keys() == gloo.keys()
        for name in gloo:
            for step, ((loss, gradients), (total, grads)) in enumerate(zip(strict[name], gloo[name], strict=True)):
                where = f"{name}, step {step} of rank {rank}"
                assert loss == total, where
                assert gradients.keys() == grads.keys(), where
                for address, gradient in grads.items():
                    assert torch.equal(gradients[address], gradient), f"{where}: the gradient of {address}"


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, list(PIPELINES)),
        (4, ["zero_bubble", "dualpipe", "dualpipev"]),
        pytest.param(8, list(PIPELINES), marks=pytest.mark.soak),
    ],
    ids=["two", "four", "eight"],
)
def test_steps_are_those_over_gloo(ranks: int, names: list[str]) -> None:
    gloo = run_ranks(messages_at_work.chained, ranks, ranks, names)
    assert_alike(run_ranks(messages_at_work.chained, ranks, ranks, names, PATIENCE), gloo)


def v3(pipeline: str, ranks: int, *overrides: str) -> tuple[str, ...]:
    few = "train.batch_sequences=8"  # the fewest of two flows through four ranks
    return (few, f"parallel={{pipeline: {{use: {pipeline}}}, pipeline_ranks: {ranks}}}", *overrides)


TWO = {name: v3(name, 2) for name in PIPELINES}
FOUR = {
    "zero_bubble": v3("zero_bubble", 4),
    "dualpipe": v3("dualpipe", 4),
    "dualpipev": v3("dualpipev", 4, "model.blocks.1.repeat=7"),
    "two pipelines": v3("dualpipe", 2, "parallel.sharding={use: zero1}"),
    "experts": v3(
        "dualpipe",
        2,
        "parallel={expert_ranks: 2, sharding: {use: fsdp}}",
        "model.block.feedforward.dispatcher={use: all_to_all}",
    ),
}


@pytest.mark.soak
@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO), (4, FOUR)], ids=["two", "four"])
def test_steps_of_v3_are_those_over_gloo(ranks: int, cases: dict[str, tuple[str, ...]]) -> None:
    gloo = run_ranks(team_at_work.several, ranks, ranks, cases)[0]
    strict = run_ranks(messages_at_work.trained, ranks, ranks, cases, PATIENCE)[0]
    assert strict.keys() == gloo.keys()
    for name, steps in gloo.items():
        for step, (found, expected) in enumerate(zip(strict[name], steps, strict=True)):
            where = f"{name}, step {step}"
            assert (found.losses, found.norm) == (expected.losses, expected.norm), where
            assert torch.equal(found.load, expected.load), where
            assert found.gradients.keys() == expected.gradients.keys(), where
            for address, gradient in expected.gradients.items():
                assert torch.equal(found.gradients[address], gradient), f"{where}: the gradient of {address}"


def test_ranks_that_send_each_other_over_one_group_wait_for_ever() -> None:
    with pytest.raises(RankError, match="did not end"):
        run_ranks(messages_at_work.chained, 2, 2, ["one_f_one_b"], LITTLE, "one group both ways")


def test_ranks_that_first_turn_to_different_neighbours_wait_for_ever() -> None:
    with pytest.raises(RankError, match="turned to"):
        run_ranks(messages_at_work.chained, 2, 2, ["dualpipe"], LITTLE, "nothing opened")


def test_receives_in_the_order_of_need_take_one_message_for_another() -> None:
    """In the V on four ranks, where both orders differ; over gloo, which heeds tags, nobody sees it."""
    right = run_ranks(messages_at_work.chained, 4, 4, ["dualpipev"])
    assert_alike(run_ranks(messages_at_work.chained, 4, 4, ["dualpipev"], None, "receives as needed"), right)
    wrong = run_ranks(messages_at_work.chained, 4, 4, ["dualpipev"], PATIENCE, "receives as needed")
    with pytest.raises(AssertionError):
        assert_alike(wrong, right)

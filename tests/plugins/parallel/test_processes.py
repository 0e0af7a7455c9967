"""Any layout on real processes: two steps leave what they leave on one rank.

The first step alone would be blind: without the root of an inner stage's loss, without the sum over a tied embedding or
over the replicas of a stage, its losses are right. So gradients are compared, and a second step.
"""

from collections.abc import Sequence
from functools import cache

import pytest
import team_at_work
import torch
from team_at_work import LENGTH, Taken, assert_the_steps_of_one

from tangram.testing import assert_same_gradients, run_ranks

BATCH = "train.batch_sequences=8"  # the fewest of two flows through four ranks
MANY = "train.batch_sequences=16"  # through eight


def on(pipeline: str, ranks: int, *overrides: str) -> tuple[str, ...]:
    return (BATCH, f"parallel={{pipeline: {{use: {pipeline}}}, pipeline_ranks: {ranks}}}", *overrides)


@cache
def alone(*overrides: str) -> list[Taken]:
    return team_at_work.two_steps(0, 1, (BATCH, *overrides))


def assert_all(ranks: int, cases: dict[str, Sequence[str]], *overrides: str) -> None:
    found = run_ranks(team_at_work.several, ranks, ranks, {name: (*case, *overrides) for name, case in cases.items()})
    assert found[0].keys() == cases.keys()
    for taken in found[0].values():
        assert_the_steps_of_one(taken, alone(*overrides))


def test_two_ranks():
    pipelines = ("gpipe", "one_f_one_b", "zero_bubble", "interleaved", "dualpipe", "dualpipev")
    cases = {name: on(name, 2) for name in pipelines}
    cases |= {"data": (BATCH,), "zero1": (BATCH, "parallel.sharding={use: zero1}")}
    assert_all(2, cases)


FEW = "train.batch_sequences=4"
FSDP = "parallel.sharding={use: fsdp}"


def test_two_ranks_that_keep_rows():
    """Weight gradients come late, and forward and backward are worked side by side."""
    assert_all(2, {name: on(name, 1, FSDP) for name in ("zero_bubble", "dualpipev")}, "model.recompute=selective", FEW)


def test_four_ranks_and_recomputation():
    cases = {
        "zero_bubble": on("zero_bubble", 4),
        "dualpipe": on("dualpipe", 4),
        "one_f_one_b over data": on("one_f_one_b", 2, "parallel.sharding={use: zero1}"),
        "dualpipe over data": on("dualpipe", 2, "parallel.sharding={use: zero1}"),
    }
    assert_all(4, cases, "model.recompute=selective")


def deep(stages: int) -> str:
    return f"model.blocks.1.repeat={stages - 1}"


def test_four_ranks_of_the_v():
    """Here ranks send in another order than their neighbours need; in DualPipe only from eight on."""
    assert_all(4, {"dualpipev": on("dualpipev", 4)}, deep(8))


@pytest.mark.soak
def test_eight_ranks_of_two_flows():
    zero1 = "parallel={expert_ranks: 2, sharding: {use: zero1}}"
    cases = {"dualpipe": on("dualpipe", 8), "experts": on("dualpipe", 4, zero1, ALL_TO_ALL)}
    assert_all(8, cases, deep(8), "model.recompute=selective", MANY)


@pytest.mark.soak
def test_eight_ranks_of_the_v():
    assert_all(8, {"dualpipev": on("dualpipev", 8)}, deep(16), MANY)


ALL_TO_ALL = "model.block.feedforward.dispatcher={use: all_to_all}"
HIERARCHICAL = "model.block.feedforward.dispatcher={use: hierarchical, node_ranks: 2}"


def test_four_ranks_that_share_out_experts():
    zero1 = "parallel={expert_ranks: 2, sharding: {use: zero1}}"
    cases = {
        "two of four data ranks": (BATCH, zero1, ALL_TO_ALL),
        "four in two nodes": (BATCH, "parallel.expert_ranks=4", HIERARCHICAL),
        "in a pipeline": on("zero_bubble", 2, "parallel.expert_ranks=2", ALL_TO_ALL),
        "between two flows": on("dualpipe", 2, zero1, ALL_TO_ALL),
    }
    assert_all(4, cases, "model.recompute=full")


def test_four_ranks_that_keep_rows():
    experts = on("dualpipe", 2, FSDP, "parallel.expert_ranks=2", ALL_TO_ALL)
    assert_all(4, {"data": (BATCH, FSDP), "experts, between two flows": experts}, "model.recompute=full")


def test_products_in_fp8_round_alike_wherever_a_micro_batch_is():
    """Its weight gradients have tiles along the tokens: those of a micro-batch stay together on any rank."""
    fp8 = "precision={use: fp8, compute: float32}"
    cases = {"pipeline": on("dualpipe", 2, fp8), "data": (BATCH, fp8)}
    one = alone(fp8)[0]
    for name, taken in run_ranks(team_at_work.several, 2, 2, cases)[0].items():
        assert taken[0].losses == {loss: pytest.approx(value, rel=1e-6) for loss, value in one.losses.items()}, name
        assert torch.equal(taken[0].load, one.load)
        assert_same_gradients(taken[0].gradients, one.gradients, length=LENGTH)


def test_rows_are_put_together_before_fp8_rounds_their_blocks():
    fp8 = ("precision={use: fp8, compute: float32}", "model.recompute=selective", FEW)
    found = run_ranks(team_at_work.two_steps, 2, 2, (FSDP, *fp8))[0]
    assert_the_steps_of_one(found, alone(*fp8), (2e-6, 2e-6))  # 16 roundings of float32


@pytest.mark.parametrize(
    ("mutant", "layout"),
    [
        ("no root on inner stages", on("one_f_one_b", 2)),
        ("no sum over the tied embedding", on("one_f_one_b", 2)),
        ("no sum over replicas", on("dualpipe", 2)),
        ("the mean of the ranks", on("sequential", 1, FSDP, FEW)),
        ("no sum over the embedding", on("sequential", 1, FSDP, FEW)),
        ("nothing comes late", on("zero_bubble", 1, FSDP, FEW)),
        ("what was whole stays", on("sequential", 1, FSDP, FEW)),
    ],
)
def test_what_the_first_losses_do_not_show_is_seen_in_the_gradients(mutant: str, layout: tuple[str, ...]) -> None:
    found = run_ranks(team_at_work.mutated, 2, 2, mutant, layout)[0]
    one = alone(*layout[layout.index(FEW) :] if FEW in layout else ())
    assert found[0].losses == {name: pytest.approx(value, rel=1e-13) for name, value in one[0].losses.items()}
    with pytest.raises(AssertionError):
        assert_the_steps_of_one(found, one)

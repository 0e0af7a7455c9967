import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.records import (
    Batch,
    EvalReport,
    GradientNorm,
    Progress,
    Result,
    StepReport,
    Verdict,
    culprit_of,
    violation,
)
from tangram.testing import batches, seeds


@given(batches(20, sequences=st.integers(1, 6)), st.integers(1, 6))
def test_micro_batches_are_the_batch_in_order_and_keep_the_global_counts(batch: Batch, count: int) -> None:
    if len(batch.tokens) % count:
        with pytest.raises(ValueError, match=f"do not divide into {count}"):
            batch.micro(0, count)
        return
    pieces = [batch.micro(i, count) for i in range(count)]
    for name in ("tokens", "targets", "positions", "segments"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
    assert {piece.n_targets for piece in pieces} == {batch.n_targets}
    assert {piece.n_sequences for piece in pieces} == {batch.n_sequences}


@given(batches(20, sequences=st.integers(1, 4)), st.integers(1, 4))
def test_progress_counts_what_the_whole_batch_consumed(batch: Batch, steps: int) -> None:
    now = Progress()
    for _ in range(steps):
        now = now.after(batch.rows(0, 1))  # a slice of it consumes the whole
    assert now == Progress(steps, steps * batch.tokens.numel(), steps * len(batch.tokens))


@given(seeds(), st.integers(1, 8))
def test_violation_is_how_far_the_fullest_expert_lies_above_the_mean(seed: int, n_experts: int) -> None:
    load = torch.randint(0, 50, (3, n_experts), generator=torch.Generator().manual_seed(seed))
    load[2] = 0
    for row, found in zip(load.tolist(), violation(load).tolist(), strict=True):
        mean = sum(row) / len(row)
        assert found == pytest.approx((max(row) - mean) / mean if mean else 0.0)


@pytest.mark.parametrize(
    ("losses", "norm", "expected"),
    [
        ({"a": 1.0}, GradientNorm(2.0), ""),
        ({"a": 1.0, "b": float("nan")}, GradientNorm(2.0), "loss b is nan"),
        ({"a": 1.0}, GradientNorm(float("inf"), ("x.w", "y.w")), "the gradient of x.w and 1 more is not finite"),
        ({"a": 1.0}, GradientNorm(float("inf")), "the gradient norm is inf"),
    ],
)
def test_the_culprit_is_named(losses: dict[str, float], norm: GradientNorm, expected: str) -> None:
    assert culprit_of(Result(losses, 0.0, torch.zeros(1, 1), 1), norm) == expected


def test_rows_of_metrics_are_flat_and_steps_count_from_one() -> None:
    result = Result({"next_token": 2.0}, 2.5, torch.tensor([[0, 0], [3, 1]]), 1)
    now, after = Progress(0, 0, 0), Progress(1, 48, 4)
    row = StepReport(now, after, 1e-3, result, GradientNorm(1.0), Verdict.SKIP, routed={1: 2}).metrics()
    assert row["step"] == 1
    assert row["violation"] == 0.5
    assert row["verdict"] == "skip"
    assert "culprit" in row
    assert all(isinstance(value, int | float | str) for value in row.values())
    report = EvalReport(after, {"next_token": 2.0}, None, 10, 0, True).metrics()
    assert "eval.bits_per_byte" not in report
    assert report["eval.loss.next_token"] == 2.0


def test_each_layer_is_told_beside_the_headline_and_by_its_own_experts_alone() -> None:
    load = torch.tensor([[0, 0, 0, 0], [3, 1, 0, 0], [2, 2, 8, 4]])  # padded to the largest number of experts
    result = Result({}, 0.0, load, 1)
    routed, biases = {1: 2, 2: 4}, {1: 0.25, 2: 1 / 3}
    now, after = Progress(), Progress(1, 48, 4)
    report = StepReport(now, after, 1e-3, result, GradientNorm(1.0), Verdict.ACCEPT, routed, biases)
    assert report.violations == {1: 0.5, 2: 1.0}
    row = report.metrics()
    assert {name: value for name, value in row.items() if name.startswith(("violation", "bias"))} == {
        "violation": 0.75,
        "violation.1": 0.5,
        "violation.2": 1.0,
        "bias": 1 / 3,
        "bias.1": 0.25,
        "bias.2": 0.333333,
    }
    plain = StepReport(now, after, 1e-3, result, GradientNorm(1.0), Verdict.ACCEPT).metrics()
    assert not [name for name in plain if name.startswith(("violation", "bias"))]

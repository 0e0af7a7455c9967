"""Matching: the nearest whole number, budgets that are equal, and refusals where they are not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_study import STUDY, study

from tangram.core.config import ConfigError
from tangram.core.matching import MOST, Matched, budget_of, closest, curves_in, matched, tokens_of
from tangram.core.pace import Pace
from tangram.core.study import Study, Variant

WIDE = "wide: {model: {block: {feedforward: {hidden: 16}}}}"


LONG = {"tokens: 48": "tokens: 48000", "until: 24": "until: 24000"}


def never(variant: Variant) -> Pace:
    raise AssertionError("time is not matched")


def asked(folder: Path, match: str, variant: str = WIDE) -> Study:
    return study(folder, {"seeds: 3": f"seeds: 3\nmatch: {match}", WIDE: variant})


def variant_of(found: Matched) -> Variant:
    return found.study.variants[1]


@given(
    slope=st.integers(1, 50),
    offset=st.integers(0, 50),
    target=st.integers(0, 5000),
    start=st.integers(1, 300),
    allowed=st.sampled_from([1, 2, 3, 8]),
)
def test_the_closest_whole_number_is_what_trying_all_finds(
    slope: int, offset: int, target: int, start: int, allowed: int
) -> None:
    def off(value: int) -> int | None:
        return slope * value + offset - target if value % allowed == 0 else None

    found = closest(off, start)
    assert found is not None
    best = min(abs(off(value)) for value in range(allowed, 6000, allowed))  # type: ignore[arg-type]
    assert abs(off(found)) == best  # type: ignore[arg-type]


def test_where_no_number_is_allowed_none_is_found() -> None:
    assert closest(lambda value: None, 5) is None


HEADS = "heads: {model: {block: {attention: {n_heads: 4, n_kv_heads: 4}}}}"


def test_parameters_are_matched_by_solving_the_field(tmp_path: Path) -> None:
    """Four heads more cost the attention 192 weights, which are 8 rows of the three matrices of the feed-forward."""
    by = "{on: parameters, by: model.block.feedforward.hidden}"
    before = asked(
        tmp_path, by, "many: {model: {dim: 64, block: {attention: {n_heads: 2}, feedforward: {hidden: 900}}}}"
    )
    before = study(
        tmp_path,
        {"seeds: 3": f"seeds: 3\nmatch: {by}", WIDE: HEADS},
        preset={"dim: 8": "dim: 32", "hidden: 8": "hidden: 64"},
    )
    target = budget_of(before.base).parameters
    assert abs(budget_of(before.variants[1]).parameters / target - 1) > MOST
    found = matched(before, never)
    assert abs(found.residuals["heads"]) <= MOST
    assert found.residuals["heads"] == budget_of(variant_of(found)).parameters / target - 1
    hidden = variant_of(found).experiment.model.blocks[0].feedforward.hidden
    for other in (hidden - 1, hidden + 1):
        tried = before.with_patch(before.variants[1], _hidden(other))
        assert abs(budget_of(tried).parameters - target) >= abs(budget_of(variant_of(found)).parameters - target)
    assert found.study.differences()["heads"]["model.block.feedforward.hidden"] == (64, hidden)


def _hidden(value: int) -> object:
    from tangram.core.config import override

    return override(f"model.block.feedforward.hidden={value}")


def test_a_residual_over_the_limit_is_refused_with_its_size(tmp_path: Path) -> None:
    """The smallest change of dim moves a model of 8 by more than 2%."""
    with pytest.raises(ConfigError) as caught:
        matched(asked(tmp_path, "{on: parameters, by: model.block.attention.n_heads}", WIDE), never)
    assert "'wide' has" in str(caught.value)
    assert "parameters and the base" in str(caught.value)
    assert "more than 2% apart" in str(caught.value)
    line = STUDY[: STUDY.index("    wide:")].count("\n") + 2
    assert f"study.yaml:{line}: match" in str(caught.value)


@pytest.mark.parametrize("path", ["model.block.feedforward.depth", "name", "train.lr", "optimizer.weight_decay"])
def test_a_field_that_is_no_whole_number_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'wide' has no whole number above 0 at"):
        matched(asked(tmp_path, f"{{on: parameters, by: {path}}}"), never)


def test_equal_tokens_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'longer' has 56 tokens and the base 48: \+16.7%, more than 2% apart"):
        matched(asked(tmp_path, "tokens", "longer: {train: {tokens: 56}}"), never)
    assert matched(asked(tmp_path, "tokens"), never).residuals == {"wide": 0.0}


def test_operations_are_matched_by_tokens_and_the_curves_go_with_them(tmp_path: Path) -> None:
    long = study(
        tmp_path,
        {"seeds: 3": "seeds: 3\nmatch: flops"},
        preset={"tokens: 48": "tokens: 48000", "until: 24": "until: 24000"},
    )
    before = {variant.name: budget_of(variant) for variant in long.variants}
    found = matched(long, never)
    wide = variant_of(found).experiment
    ratio = before["base"].flops / before["wide"].flops
    assert ratio < 0.95
    assert abs(found.residuals["wide"]) <= MOST
    assert found.budgets["wide"].tokens == pytest.approx(48000 * ratio, abs=wide.train.sequence_length)
    assert found.budgets["base"].tokens == 48000
    assert wide.train.lr.pieces[0].until.at == pytest.approx(24000 * ratio, abs=1)
    changed = found.study.differences()["wide"]
    assert {"train.tokens", "train.lr.0.until", "model.block.feedforward.hidden"} == set(changed)
    assert "stretched" in found.statement


def test_objectives_whose_operations_are_not_counted_are_not_matched_by_operations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'ahead' has other objectives, whose operations are not counted"):
        matched(asked(tmp_path, "flops", "ahead: {objectives: {mtp: {use: mtp, depth: 1}}}"), never)


def test_time_is_matched_by_what_a_trial_measured(tmp_path: Path) -> None:
    speeds = {"base": 1000.0, "wide": 500.0}
    long = study(
        tmp_path,
        {"seeds: 3": "seeds: 3\nmatch: time"},
        preset={"tokens: 48": "tokens: 48000", "until: 24": "until: 24000"},
    )
    found = matched(long, lambda variant: Pace(0.0, speeds[variant.name], 0.0))
    assert found.budgets["wide"].tokens == 24000
    assert found.residuals == {}


def test_time_of_what_is_too_large_to_try_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'base' is too large to try on this machine"):
        matched(asked(tmp_path, "time"), lambda variant: None)


def test_variants_that_matching_makes_one_are_refused(tmp_path: Path) -> None:
    """Two widths of the feed-forward, both solved for the base's parameters, are the base."""
    by = "{on: parameters, by: model.block.feedforward.hidden}"
    with pytest.raises(ConfigError, match="'base' and 'wide' resolve to the same experiment"):
        matched(asked(tmp_path, by), never)


def test_every_curve_of_an_experiment_is_found(tmp_path: Path) -> None:
    experiment = study(tmp_path).base.experiment
    assert (
        {"train.lr", "train.batch_sequences", "objectives.next_token.weight"}
        >= {path for path, _ in curves_in(experiment)}
        >= {"train.lr", "train.batch_sequences"}
    )


def test_tokens_are_those_of_whole_steps(tmp_path: Path) -> None:
    found = study(tmp_path, preset={"tokens: 48": "tokens: 41"})
    assert tokens_of(found.base.experiment) == 48

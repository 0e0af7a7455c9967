"""A curve is exact where constant, continuous and monotone where it ramps, and reads back what it writes."""

import itertools
import math
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tangram.core.curve import Constant, Curve, CurveError, End, Ramp
from tangram.core.records import Progress
from tangram.testing.strategies import curves

EPS = sys.float_info.epsilon
moments = st.builds(Progress, step=st.integers(0, 20_000), tokens=st.integers(0, 20 * 10**12))
values = st.floats(-1e6, 1e6)
shapes = st.sampled_from(["linear", "cosine"])


def at(unit: str, position: int) -> Progress:
    return Progress(tokens=position) if unit == "tokens" else Progress(step=position)


@st.composite
def ramps(draw: st.DrawFn) -> tuple[Curve, Ramp, int]:
    """A curve of a constant, a ramp and a constant; the ramp; and where it begins."""
    unit = draw(st.sampled_from(["tokens", "steps"]))
    begin = draw(st.integers(1, 10**6))
    ramp = Ramp(draw(values), draw(values), draw(shapes), End(begin + draw(st.integers(1, 10**6)), unit))
    return Curve((Constant(-1.0, End(begin, unit)), ramp, Constant(ramp.stop))), ramp, begin


@given(values, moments)
def test_a_constant_is_exact_everywhere(value, now):
    assert Curve.constant(value)(now) == value


@given(curves(-1e3, 1e3))
def test_parse_reads_back_what_dump_wrote(curve):
    again = Curve.parse(curve.dump())
    assert again == curve
    assert repr(again.dump()) == repr(curve.dump())


@given(st.integers(-(10**6), 10**6))
def test_the_spelling_of_a_number_leaves_no_trace(value):
    as_int, as_float = Curve.parse(value), Curve.parse([{"value": float(value)}])
    assert as_int == as_float
    assert repr(as_int.dump()) == repr(as_float.dump())
    assert repr(Curve.constant(-0.0).dump()) == repr(Curve.constant(0).dump())


@given(ramps())
def test_a_ramp_begins_at_its_start_and_the_next_piece_holds_at_exactly_its_end(drawn):
    curve, ramp, begin = drawn
    unit, end = ramp.until.unit, ramp.until.at
    assert curve(at(unit, begin - 1)) == -1.0
    assert curve(at(unit, begin)) == ramp.start
    assert curve(at(unit, end)) == ramp.stop


@given(ramps())
def test_a_ramp_reaches_its_stop_without_a_jump(drawn):
    curve, ramp, begin = drawn
    unit, end = ramp.until.unit, ramp.until.at
    span, steepest = abs(ramp.stop - ramp.start), math.pi / 2
    bound = span * steepest / (end - begin) + 4 * EPS * (abs(ramp.start) + abs(ramp.stop))
    assert abs(curve(at(unit, end - 1)) - ramp.stop) <= bound


@given(ramps(), st.data())
def test_a_ramp_is_monotone_and_stays_between_its_ends(drawn, data):
    curve, ramp, begin = drawn
    unit, end = ramp.until.unit, ramp.until.at
    points = sorted(data.draw(st.lists(st.integers(begin, end - 1), min_size=2, max_size=8)))
    sign = 1 if ramp.stop >= ramp.start else -1
    slack = 4 * EPS * (abs(ramp.start) + abs(ramp.stop))
    row = [ramp.start, *(curve(at(unit, point)) for point in points), ramp.stop]
    assert all(sign * (b - a) >= -slack for a, b in itertools.pairwise(row))


@given(values, values, shapes, st.integers(1, 10**6))
def test_both_shapes_pass_the_middle_half_way_and_a_cosine_is_late_before_it(start, stop, shape, half):
    assume(abs(stop - start) > 1e-3)
    end = {"until": 4 * half, "from": start, "to": stop, "shape": shape}
    curve = Curve.parse([end, {"value": stop}])
    slack = 8 * EPS * (abs(start) + abs(stop))
    assert abs(curve(Progress(tokens=2 * half)) - (start + stop) / 2) <= slack
    quarter = (curve(Progress(tokens=half)) - start) / (stop - start)
    expected = 0.25 if shape == "linear" else (1 - math.sqrt(0.5)) / 2
    assert quarter == pytest.approx(expected, abs=1e-6)


def test_the_learning_rate_of_deepseek_v3_is_the_papers():
    lr = Curve.parse(
        [
            {"until_step": 2000, "from": 0.0, "to": 2.2e-4, "shape": "linear"},
            {"until": 10e12, "value": 2.2e-4},
            {"until": 14.3e12, "from": 2.2e-4, "to": 2.2e-5, "shape": "cosine"},
            {"until": 14.633e12, "value": 2.2e-5},
            {"value": 7.3e-6},
        ]
    )
    late = 10**5
    assert lr(Progress(step=1000, tokens=10**10)) == pytest.approx(1.1e-4)
    assert lr(Progress(step=2000, tokens=2 * 10**10)) == 2.2e-4
    assert lr(Progress(step=late, tokens=12_150 * 10**9)) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert lr(Progress(step=late, tokens=14_300 * 10**9)) == 2.2e-5
    assert lr(Progress(step=late, tokens=14_700 * 10**9)) == 7.3e-6


RAMP = {"until": 10, "from": 0, "to": 1, "shape": "linear"}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (True, "got True"),
        ("3", "got '3'"),
        (None, "a number or a list"),
        ({"value": 1}, "a number or a list"),
        (math.inf, "finite"),
        (10**400, "finite"),
        ([], "empty list"),
        ([3], "expected a map"),
        ([{}], "missing `value`"),
        ([{"value": "x"}], "piece 0: value: expected a number, got 'x'"),
        ([{"value": True}], "got True"),
        ([{"value": math.nan}], "finite"),
        ([{"value": 1, "to": 2}], "unexpected here"),
        ([{"value": 1, "untill": 2}], "unexpected here"),
        ([{"value": 1, "until": 5}], "the last piece must not end"),
        ([{"value": 1}, {"value": 2}], "only the last piece"),
        ([{"value": 1, "until": 2.5}, {"value": 2}], "whole number > 0, got 2.5"),
        ([{"value": 1, "until": 0}, {"value": 2}], "whole number > 0, got 0"),
        ([{"value": 1, "until": "9"}, {"value": 2}], "got '9'"),
        ([{"value": 1, "until": 5, "until_step": 5}, {"value": 2}], "ends twice"),
        ([{"value": 1, "until": 5}, {"value": 1, "until": 5}, {"value": 2}], "must be more than 5"),
        ([RAMP], "cannot be a ramp"),
        ([{**RAMP, "shape": "square"}, {"value": 1}], "one of linear, cosine"),
        ([{"until": 10, "from": 0, "to": 1}, {"value": 1}], "missing `shape`"),
        ([{"from": 0, "to": 1, "shape": "linear"}, {"value": 1}], "a ramp needs an end"),
        ([{"until_step": 5, "value": 0}, RAMP, {"value": 1}], "where it begins is not known"),
    ],
)
def test_a_curve_that_cannot_be_is_refused_with_words(raw, said):
    with pytest.raises(CurveError) as caught:
        Curve.parse(raw)
    assert said in str(caught.value)


def test_ends_in_different_units_are_not_compared():
    curve = Curve.parse([{"until_step": 2000, "value": 1}, {"until": 10, "value": 2}, {"value": 3}])
    assert [curve(Progress(0, 50)), curve(Progress(2000, 5)), curve(Progress(2000, 50))] == [1, 2, 3]


def test_everything_wrong_with_a_curve_is_told_at_once_with_its_place():
    with pytest.raises(CurveError) as caught:
        Curve.parse([{"until": -1, "value": "x"}, {"valu": 3}])
    assert {path for path, _ in caught.value.problems} == {(0, "until"), (0, "value"), (1, "valu"), (1,)}


def test_a_curve_built_in_python_is_held_to_the_same_order():
    with pytest.raises(ValueError, match="must be more than 5"):
        Curve((Constant(1.0, End(5, "steps")), Constant(1.0, End(4, "steps")), Constant(0.0)))
    with pytest.raises(ValueError, match="needs a piece"):
        Curve(())

"""A curve is exact where constant, continuous and monotone where it ramps, and reads back what it writes."""

import itertools
import math
import sys
import tempfile
from pathlib import Path

import attrs
import pytest
import toys
from hypothesis import assume, given
from hypothesis import strategies as st

from tangram.core.curve import Constant, Curve, CurveError, End, Ramp
from tangram.core.experiment import Experiment
from tangram.core.presets import to_yaml
from tangram.core.records import Progress
from tangram.testing.strategies import curves

EPS = sys.float_info.epsilon
moments = st.builds(Progress, step=st.integers(0, 20_000), tokens=st.integers(0, 20 * 10**12))
values = st.floats(-1e6, 1e6)
shapes = st.sampled_from(["linear", "cosine"])


def toy() -> Experiment:
    with tempfile.TemporaryDirectory() as folder:
        return toys.resolved(Path(folder)).experiment


TOY = toy()


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


@st.composite
def in_one_unit(draw: st.DrawFn, *, joined: bool = False) -> tuple[Curve, str]:
    """A curve of several pieces that end in one unit, and the unit; if `joined`, each begins where the last ended."""
    unit = draw(st.sampled_from(["tokens", "steps"]))
    pieces: list[Constant | Ramp] = []
    value, position = draw(values), 0
    for _ in range(draw(st.integers(1, 4))):
        position += draw(st.integers(1, 10**6))
        start = value if joined else draw(values)
        value = draw(values)
        ramp = Ramp(start, value, draw(shapes), End(position, unit))
        pieces.append(ramp if draw(st.booleans()) else Constant(start, End(position, unit)))
        value = value if pieces[-1] is ramp else start
    return Curve((*pieces, Constant(value if joined else draw(values)))), unit


def begins_with(piece: Constant | Ramp) -> float:
    return piece.start if isinstance(piece, Ramp) else piece.value


@given(in_one_unit())
def test_each_piece_begins_exactly_at_the_end_before_and_the_last_one_stays(drawn):
    curve, unit = drawn
    begins = [0, *(piece.until.at for piece in curve.pieces[:-1])]
    assert [curve(at(unit, begin)) for begin in begins] == [begins_with(piece) for piece in curve.pieces]
    for piece, begin in zip(curve.pieces, begins[1:], strict=False):
        if isinstance(piece, Constant):
            assert curve(at(unit, begin - 1)) == piece.value
    assert [curve.settled(at(unit, begin)) for begin in begins] == [False] * (len(begins) - 1) + [True]
    assert {curve(at(unit, begins[-1] + ahead)) for ahead in (0, 1, 10**6, 2**62)} == {curve.pieces[-1].value}


@given(in_one_unit(joined=True), st.data())
def test_pieces_that_meet_have_no_jump(drawn, data):
    curve, unit = drawn
    begins = [0, *(piece.until.at for piece in curve.pieces[:-1])]
    points = data.draw(st.lists(st.integers(0, begins[-1]), max_size=4))
    for point in (*points, *(begin - 1 for begin in begins[1:])):
        i = max(i for i, begin in enumerate(begins) if begin <= point)
        piece, bound = curve.pieces[i], 0.0
        if isinstance(piece, Ramp):  # half a cosine wave is at its steepest pi / 2 times as steep as the line
            bound = math.pi / 2 * abs(piece.stop - piece.start) / (piece.until.at - begins[i])
            bound += 8 * EPS * (abs(piece.start) + abs(piece.stop))
        assert abs(curve(at(unit, point + 1)) - curve(at(unit, point))) <= bound


@given(in_one_unit(), st.data())
def test_a_value_lies_between_the_ends_of_its_piece_without_any_slack(drawn, data):
    curve, unit = drawn
    begins = [0, *(piece.until.at for piece in curve.pieces[:-1])]
    i = data.draw(st.integers(0, len(begins) - 2))
    points = data.draw(st.lists(st.integers(begins[i], begins[i + 1] - 1), min_size=1, max_size=4))
    piece = curve.pieces[i]
    low, high = sorted((begins_with(piece), piece.stop if isinstance(piece, Ramp) else piece.value))
    for point in (*points, begins[i + 1] - 1):
        assert low <= curve(at(unit, point)) <= high


def test_a_cosine_does_not_round_past_its_end():
    ends = [i / 7 for i in range(1, 60)]
    for start, stop in itertools.product(ends, ends):
        late = Ramp(start, stop, "cosine", End(10**9, "tokens")).at(0, Progress(tokens=10**9 - 1))
        assert min(start, stop) <= late <= max(start, stop)


def refused(raw: object) -> set[tuple[int | str, ...]]:
    """Return where a curve is wrong; nothing if it is not."""
    try:
        Curve.parse(raw)
    except CurveError as error:
        return {path for path, _ in error.problems}
    return set()


whole = st.integers(1, 2**64) | st.integers(1, 10**18).map(float) | st.floats(1, 1e300).map(math.floor).map(float)


@given(whole, st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_what_a_preset_may_say_of_a_curve_it_also_shows(end, value, last):
    raw = [{"until": end, "value": value}, {"until_step": end, "value": last}, {"value": value}]
    assert refused(raw) == (set() if end < 2**63 else {(0, "until"), (1, "until_step")})
    curve = Curve.parse(raw if end < 2**63 else last)
    experiment = attrs.evolve(TOY, train=attrs.evolve(TOY.train, lr=curve))
    with tempfile.TemporaryDirectory() as folder:
        assert toys.resolved(Path(folder), text=to_yaml(experiment)).experiment.train.lr == curve


@given(st.lists(st.tuples(st.sampled_from(["until", "until_step"]), st.integers(1, 6)), max_size=6))
def test_ends_are_refused_exactly_where_they_do_not_increase_in_their_unit(ends):
    raw = [*({unit: end, "value": 1.0} for unit, end in ends), {"value": 0.0}]
    late = {
        (i,)
        for i, (unit, end) in enumerate(ends)
        if end <= next((other for u, other in reversed(ends[:i]) if u == unit), 0)
    }
    assert refused(raw) == late
    assert late or Curve.parse(raw).dump() == (raw if ends else 0.0)


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
        ([{"value": 1, "until": 2.5}, {"value": 2}], "whole number > 0 and < 2**63, got 2.5"),
        ([{"value": 1, "until": 0}, {"value": 2}], "whole number > 0 and < 2**63, got 0"),
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

"""The tolerance holds for honest rounding, and catches what is not rounding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.testing import assert_close, assert_same_gradients, seeds, tolerance

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(dtype=st.sampled_from(FLOATS[1:]), length=st.integers(1, 2000), seed=seeds())
def test_sums_rounded_at_every_term_stay_within(dtype: torch.dtype, length: int, seed: int) -> None:
    terms = normal(seed, length, 8).to(dtype)
    total = torch.zeros(8, dtype=dtype)
    for term in terms:
        total = total + term
    assert_close(total, terms.double().sum(0), length=length)


@given(dtype=st.sampled_from(FLOATS[1:3]), length=st.integers(1, 512), seed=seeds())
def test_a_term_left_out_is_caught(dtype: torch.dtype, length: int, seed: int) -> None:
    """One of n terms is 1 / n of the sum of squares, above the limit until sqrt(n) ** 3 reaches 1 / (4 u)."""
    largest = (1 / (4 * torch.finfo(dtype).eps / 2)) ** (2 / 3) / 2
    length = 1 + length % int(largest)
    x = torch.ones(length, dtype=dtype)
    with pytest.raises(AssertionError, match="over the limit"):
        assert_close(x[1:].sum(), (x.double() ** 2).sum(), length=length, dtype=dtype)


@given(dtype=st.sampled_from(FLOATS), length=st.integers(1, 10**6), factor=st.integers(2, 100))
def test_tolerance_grows_with_the_root_of_the_length(dtype: torch.dtype, length: int, factor: int) -> None:
    assert tolerance(dtype, length * factor**2) == pytest.approx(factor * tolerance(dtype, length))


def test_tolerance_is_ordered_by_precision() -> None:
    bounds = [tolerance(dtype, 64) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert bounds == sorted(bounds)
    assert bounds[1] == pytest.approx(4 * 8 * 2**-24)


@pytest.mark.parametrize(("dtype", "length"), [(torch.int64, 1), (torch.float32, 0)])
def test_tolerance_refuses_what_does_not_round(dtype: torch.dtype, length: int) -> None:
    with pytest.raises(ValueError, match=r"torch\.equal|length=0"):
        tolerance(dtype, length)


@given(seed=seeds(), exponent=st.integers(-30, 30))
def test_closeness_does_not_depend_on_the_unit(seed: int, exponent: int) -> None:
    expected = normal(seed, 5)
    limit = tolerance(torch.float32, 1) * expected.abs().max()
    scale = 2.0**exponent
    assert_close(scale * (expected + 0.99 * limit), scale * expected, dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_close(scale * (expected + 1.01 * limit), scale * expected, dtype=torch.float32)


def test_the_coarser_dtype_rules_unless_one_is_named() -> None:
    expected = torch.tensor([1.0, 3.0], dtype=torch.float64) / 3
    assert_close(expected.bfloat16(), expected)
    assert_close(expected.bfloat16().double(), expected, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_close(expected.bfloat16().double(), expected)


def test_the_message_names_the_worst_element() -> None:
    expected = torch.ones(2, 3)
    actual = expected.clone()
    actual[0, 1], actual[1, 2] = 1.1, 1.5
    with pytest.raises(AssertionError, match=r"logits: .* times over the limit, at \[1, 2\]: 1\.5, expected 1"):
        assert_close(actual, expected, msg="logits")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_must_stand_in_the_same_place(bad: float) -> None:
    expected = torch.tensor([1.0, bad])
    assert_close(expected.clone(), expected)
    others = [other for other in (2.0, math.nan, math.inf, -math.inf) if repr(other) != repr(bad)]
    for actual in [torch.tensor([bad, 1.0]), *(torch.tensor([1.0, other]) for other in others)]:
        with pytest.raises(AssertionError, match="inf times"):
            assert_close(actual, expected)
    with pytest.raises(AssertionError):
        assert_close(expected, torch.tensor([1.0, 2.0]))


def test_zero_must_be_zero_and_shapes_must_agree() -> None:
    assert_close(torch.zeros(3), torch.zeros(3))
    assert_close(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(AssertionError, match="inf times"):
        assert_close(torch.full((3,), 1e-30), torch.zeros(3))
    with pytest.raises(AssertionError, match=r"shape \[3\], expected \[1, 3\]"):
        assert_close(torch.zeros(3), torch.zeros(1, 3))


def test_integers_are_compared_exactly() -> None:
    big = torch.tensor([2**60])
    assert_close(big, big.clone())
    with pytest.raises(AssertionError, match="exactly"):
        assert_close(big + 1, big)
    with pytest.raises(AssertionError, match="exactly"):
        assert_close(big.double(), big)


def test_gradients_are_compared_each_on_its_own_scale() -> None:
    expected = {"head": torch.full((2,), 1e6), "norm": torch.full((2,), 1e-6), "unused": None}
    assert_same_gradients(dict(reversed(expected.items())), expected)
    with pytest.raises(AssertionError, match="step 2: 1 of 3 differ, worst norm: "):
        assert_same_gradients({**expected, "norm": torch.full((2,), 1.001e-6)}, expected, msg="step 2")


def test_the_worst_gradient_is_named() -> None:
    expected = {name: torch.ones(2) for name in ("a", "b", "c")}
    actual = {"a": torch.full((2,), 1.1), "b": torch.full((2,), 1.2), "c": torch.ones(2)}
    with pytest.raises(AssertionError, match="2 of 3 differ, worst b: "):
        assert_same_gradients(actual, expected)


def test_no_gradient_is_not_a_gradient_of_zero() -> None:
    zero = {"a": torch.zeros(1)}
    with pytest.raises(AssertionError, match=r"worst a: .* has none"):
        assert_same_gradients({"a": None}, zero)
    with pytest.raises(AssertionError, match=r"worst a: .* expected none"):
        assert_same_gradients(zero, {"a": None})
    with pytest.raises(AssertionError, match=r"unexpected \['b'\], missing \['a'\]"):
        assert_same_gradients({"b": None}, {"a": None})

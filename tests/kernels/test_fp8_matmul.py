"""Products in FP8 against the formula, tile by tile in float64, and against what the format can hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from literal_fp8 import distance, literal, room, sizes
from torch import Tensor
from torch.nn import functional as F
from twins import DEVICE, guarded, numbers, on_both, opcheck_of_codes, same_bits, strided

from tangram import kernels
from tangram.kernels import Quantized, fp8_matmul, products, quantize_blocks, quantize_tiles
from tangram.testing import tolerance

EPS = torch.finfo(torch.float32).eps
WAYS = {"blocks": quantize_blocks, "tiles": quantize_tiles}
SIZES = st.sampled_from([1, 5, 127, 128, 130, 257])


@given(rows=SIZES, columns=SIZES, depth=SIZES, way=st.sampled_from(sorted(WAYS)), seed=st.integers(0, 99))
def test_the_twin_is_the_literal_sum_over_tiles(rows, columns, depth, way, seed):
    a = quantize_tiles(numbers(rows, depth, seed=seed, decades=4))
    b = WAYS[way](numbers(columns, depth, seed=seed + 100, decades=4))
    y = fp8_matmul(a, b, torch.float32)
    assert (y.dtype, y.shape) == (torch.float32, (rows, columns))
    # Both operands and their product are rounded, and K terms summed.
    assert ((y - literal(a, b)).abs() <= (depth + 3) * EPS * sizes(a, b)).all()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_costs_a_rounding_of_the_result_and_of_scales_that_are_no_powers_of_two(native, way, monkeypatch):
    monkeypatch.setattr(products, "native_bfloat16", lambda: native)
    x, w = numbers(70, 257, seed=1), numbers(130, 257, seed=2)
    for two in (False, True):
        a, b = quantize_tiles(x, power_of_two=two), WAYS[way](w, power_of_two=two)
        y = fp8_matmul(a, b, torch.bfloat16)
        assert y.dtype is torch.bfloat16
        roundings = 3 if native and not two else 1
        assert distance(y, literal(a, b)) <= roundings**0.5 * 2**-9


def step(x: Tensor, tile: tuple[int, int], two: bool) -> Tensor:
    """The most by which a number may move: half a unit of three bits, or of the smallest step of its tile's scale."""
    peaks = F.max_pool2d(x.abs()[None], tile, ceil_mode=True)[0]
    each = peaks.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[: x.shape[0], : x.shape[1]]
    scales = each.clamp_min(1e-4) / 448 * (2 if two else 1)  # rounded up to a power of two it is less than twice that
    return torch.maximum(2**-4 * x.abs(), 2**-10 * scales) * (1 + 4 * EPS)


@given(rows=SIZES, columns=SIZES, depth=SIZES, two=st.booleans(), seed=st.integers(0, 99))
def test_no_element_is_further_from_the_product_itself_than_e4m3_allows(rows, columns, depth, two, seed):
    x, w = numbers(rows, depth, seed=seed, decades=6).double(), numbers(columns, depth, seed=seed + 100).double()
    for way, tile in (("blocks", (128, 128)), ("tiles", (1, 128))):
        y = fp8_matmul(
            quantize_tiles(x.float(), power_of_two=two), WAYS[way](w.float(), power_of_two=two), torch.float32
        )
        x_step, w_step = step(x, (1, 128), two), step(w, tile, two)
        limit = x_step @ w.abs().t() + (x.abs() + x_step) @ w_step.t()
        summing = (depth + 3) * EPS * (x.abs() + x_step) @ (w.abs() + w_step).t()
        assert ((y - x @ w.t()).abs() <= limit + summing).all()


def test_an_outlier_ruins_the_other_rows_where_the_whole_tensor_has_one_scale_and_not_with_tiles():
    x, w = numbers(33, 512, seed=1), quantize_blocks(0.02 * numbers(130, 512, seed=2))
    far = x.clone()
    far[7, 300] = 1e6
    others = torch.arange(33) != 7
    wanted = far.double() @ literal(Quantized(torch.eye(512), torch.ones(512, 4)), w)

    def median(x: Tensor, shared: str) -> float:
        y = fp8_matmul(quantize_tiles(x, shared=shared), w, torch.float32)
        return float(((y - wanted).norm(dim=1) / wanted.norm(dim=1))[others].median())

    # The rounding of one operand is 2^-4 at most, and a third of its square on average.
    assert median(x, "tile") <= 2**-4 and median(x, "tensor") <= 2**-4
    assert median(far, "tile") == median(x, "tile")
    # What is below half a step of the outlier's scale, 1e6 / 448 * 2^-10 or 2.2, is lost.
    assert median(far, "tensor") >= 0.75


def test_tiles_of_zeros_add_nothing():
    x, w = numbers(5, 384, seed=1), numbers(130, 384, seed=2)
    x[:, 128:256], w[:128] = 0.0, 0.0
    a, b = quantize_tiles(x), quantize_blocks(w)
    y = fp8_matmul(a, b, torch.float32)
    kept = fp8_matmul(*(Quantized(m.codes[:, :128], m.scales[:, :1]) for m in (a, b)), torch.float32)
    kept += fp8_matmul(*(Quantized(m.codes[:, 256:], m.scales[:, 2:]) for m in (a, b)), torch.float32)
    assert not y[:, :128].any() and y[:, 128:].all()
    assert distance(y, kept) <= tolerance(torch.float32, 384)
    assert not fp8_matmul(quantize_tiles(torch.zeros(5, 384)), b, torch.float32).any()


@given(seed=st.integers(0, 99), power=st.integers(-5, 20))
def test_the_unit_of_a_matrix_is_the_unit_of_the_product(seed, power):
    x, w = numbers(7, 200, seed=seed), quantize_blocks(numbers(9, 200, seed=seed + 100))
    one = fp8_matmul(quantize_tiles(x), w, torch.float32)
    other = fp8_matmul(quantize_tiles(x * 2.0**power), w, torch.float32)
    assert same_bits(one * 2.0**power, other)


def test_mistakes_are_named():
    x, w = quantize_tiles(torch.ones(5, 300)), quantize_blocks(torch.ones(200, 300))
    with pytest.raises(ValueError, match="both are"):
        fp8_matmul(x, quantize_blocks(torch.ones(200, 299)), torch.float32)
    with pytest.raises(ValueError, match=r"left matrix has scales \[5, 2\], not \[5, 3\]"):
        fp8_matmul(Quantized(x.codes, x.scales[:, :2]), w, torch.float32)
    with pytest.raises(ValueError, match=r"right matrix has scales \[1, 3\], not \[200, 3\] or \[2, 3\]"):
        fp8_matmul(x, Quantized(w.codes, w.scales[:1]), torch.float32)


SHAPES = [(130, 257, 300), (1, 1, 1), (128, 128, 128), (70, 129, 385), (0, 128, 128), (5, 128, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_the_product_of_the_twin(shape, way, dtype):
    rows, columns, depth = shape
    plain = quantize_tiles(numbers(rows, depth, seed=1, decades=4)), WAYS[way](numbers(columns, depth, seed=2))
    for hold in (guarded, strided):
        a, b = (Quantized(*map(hold, each)) for each in plain)
        twin, kernel = on_both(lambda a=a, b=b: fp8_matmul(a, b, dtype))
        assert (kernel.dtype, kernel.shape) == (dtype, (rows, columns))
        assert distance(kernel, twin) <= room(dtype, depth)
        assert distance(kernel, literal(a, b)) <= room(dtype, depth)


def test_programs_in_groups_compute_every_block():
    a, b = quantize_tiles(numbers(1030, 3, seed=1)), quantize_blocks(numbers(270, 3, seed=2))  # 9 times 3 blocks
    twin, kernel = on_both(lambda: fp8_matmul(Quantized(*map(guarded, a)), Quantized(*map(guarded, b)), torch.float32))
    assert distance(kernel, twin) <= room(torch.float32, 3)


def test_the_kernel_takes_a_transposed_weight_and_other_codes():
    grad = quantize_tiles(numbers(9, 300, seed=1), format=torch.float8_e5m2, shared="row")
    weight = quantize_blocks(numbers(300, 140, seed=2))
    a = Quantized(*map(guarded, grad))
    b = Quantized(*(guarded(each).t() for each in weight))
    twin, kernel = on_both(lambda: fp8_matmul(a, b, torch.float32))
    assert distance(kernel, twin) <= room(torch.float32, 300)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_torch_knows_the_operation(path):
    a, b = quantize_tiles(numbers(5, 140, seed=1)), quantize_blocks(numbers(130, 140, seed=2))
    inputs = [each.to(DEVICE) for each in (*a, *b)]
    with kernels.use(path):
        opcheck_of_codes(torch.ops.tangram.fp8_matmul, (*inputs, torch.bfloat16))
        a, b = (Quantized(*(each.to("meta") for each in m)) for m in (a, b))
        y = fp8_matmul(a, b, torch.bfloat16)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (5, 130))

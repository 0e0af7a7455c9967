"""Grouped products in FP8 against one product an expert, by the formula in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from literal_fp8 import distance, literal, room, sizes
from torch import Tensor
from twins import DEVICE, guarded, numbers, on_both, opcheck_of_codes, same_bits, strided

from tangram import kernels
from tangram.kernels import (
    Quantized,
    fp8_grouped_matmul,
    fp8_grouped_weight_grad,
    fp8_matmul,
    pad_groups,
    quantize_blocks,
    quantize_tiles,
)

EPS = torch.finfo(torch.float32).eps
COUNTS = st.lists(st.sampled_from([0, 0, 1, 3, 127, 128, 130]), min_size=1, max_size=5)
WIDTHS = st.sampled_from([1, 2, 8, 128, 129, 260])


def of_experts(rows: Quantized, weight: Quantized, counts: Tensor) -> list[tuple[Quantized, Quantized]]:
    """The rows and the matrix of each expert."""
    parts = zip(*(torch.split(each, counts.tolist()) for each in rows), strict=True)
    return [(Quantized(*p), Quantized(*w)) for p, *w in zip(parts, *weight, strict=True)]


def of_columns(grad: Quantized, rows: Quantized, counts: Tensor) -> list[tuple[Quantized, Quantized]]:
    """The columns that are each expert's rows, of the transposed gradient and the transposed rows."""
    tiles = counts // 128
    cut = [
        zip(torch.split(m.codes, counts.tolist(), 1), torch.split(m.scales, tiles.tolist(), 1), strict=True)
        for m in (grad, rows)
    ]
    return [(Quantized(*g), Quantized(*r)) for g, r in zip(*cut, strict=True)]


def drawn(counts: Tensor, outputs: int, inputs: int, seed: int) -> tuple[Quantized, Quantized]:
    rows = numbers(int(counts.sum()), inputs, seed=seed, decades=4)
    return quantize_tiles(rows), quantize_blocks(numbers(len(counts), outputs, inputs, seed=seed + 100, decades=4))


def drawn_columns(counts: Tensor, outputs: int, inputs: int, seed: int) -> tuple[Quantized, Quantized, Tensor]:
    grad, padded = pad_groups(numbers(int(counts.sum()), outputs, seed=seed, decades=4), counts)
    rows, _ = pad_groups(numbers(int(counts.sum()), inputs, seed=seed + 100, decades=4), counts)
    return quantize_tiles(grad, transposed=True), quantize_tiles(rows, transposed=True), padded


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    multiple=st.integers(1, 5),
    width=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_padding_keeps_every_experts_rows_and_adds_zeros(counts, multiple, width, dtype):
    counts = torch.tensor(counts)
    total = int(counts.sum())
    rows = 1 + torch.arange(total * width).view(total, width).to(dtype)
    more, padded = pad_groups(rows, counts, multiple)
    assert (more.dtype, len(more)) == (dtype, int(padded.sum()))
    assert not (padded % multiple).any()
    assert ((padded >= counts) & (padded < counts + multiple)).all()
    for part, mine in zip(torch.split(more, padded.tolist()), torch.split(rows, counts.tolist()), strict=True):
        assert torch.equal(part[: len(mine)], mine)
        assert not part[len(mine) :].any()


@given(counts=COUNTS, outputs=WIDTHS, inputs=WIDTHS, seed=st.integers(0, 99))
def test_the_twins_are_the_literal_products_of_each_expert(counts, outputs, inputs, seed):
    counts = torch.tensor(counts)
    rows, weight = drawn(counts, outputs, inputs, seed)
    y = fp8_grouped_matmul(rows, weight, counts, torch.float32)
    pairs = of_experts(rows, weight, counts)
    limit = (inputs + 3) * EPS * torch.cat([sizes(*pair) for pair in pairs])
    assert y.dtype is torch.float32
    assert ((y - torch.cat([literal(*pair) for pair in pairs])).abs() <= limit).all()

    grad, rows, padded = drawn_columns(counts, outputs, inputs, seed)
    y = fp8_grouped_weight_grad(grad, rows, padded, torch.float32)
    pairs = of_columns(grad, rows, padded)
    limit = (int(padded.max()) + 3) * EPS * torch.stack([sizes(*pair) for pair in pairs])
    assert y.dtype is torch.float32
    assert ((y - torch.stack([literal(*pair) for pair in pairs])).abs() <= limit).all()
    assert not y[counts == 0].any()


@given(counts=COUNTS, seed=st.integers(0, 99))
def test_the_order_of_the_experts_does_not_matter(counts, seed):
    counts = torch.tensor(counts)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))

    def reordered(x: Tensor, sizes: Tensor, dim: int = 0) -> Tensor:
        parts = torch.split(x.view(torch.uint8) if x.dtype.itemsize == 1 else x, sizes.tolist(), dim)
        return torch.cat([parts[e] for e in order], dim).view(x.dtype)

    rows, weight = drawn(counts, 12, 130, seed)
    y = fp8_grouped_matmul(rows, weight, counts, torch.float32)
    others = Quantized(*(reordered(each, counts) for each in rows)), Quantized(*(each[order] for each in weight))
    room = 2 * 133 * EPS * torch.cat([sizes(*pair) for pair in of_experts(rows, weight, counts)])
    other = fp8_grouped_matmul(*others, counts[order], torch.float32)
    assert ((other - reordered(y, counts)).abs() <= reordered(room, counts)).all()

    grad, rows, padded = drawn_columns(counts, 12, 20, seed)
    y = fp8_grouped_weight_grad(grad, rows, padded, torch.float32)
    others = (Quantized(reordered(m.codes, padded, 1), reordered(m.scales, padded // 128, 1)) for m in (grad, rows))
    room = 2 * (256 + 3) * EPS * torch.stack([sizes(*pair) for pair in of_columns(grad, rows, padded)])
    other = fp8_grouped_weight_grad(*others, padded[order], torch.float32)
    assert ((other - y[order]).abs() <= room[order]).all()


@given(tiles=st.lists(st.integers(0, 3), min_size=1, max_size=4), cut=st.integers(0, 3), seed=st.integers(0, 99))
def test_the_gradient_at_the_weights_is_that_of_any_batches_with_the_same_tiles(tiles, cut, seed):
    counts = 128 * torch.tensor(tiles)
    first = counts.clamp_max(128 * cut)  # what of each expert the first batch has
    grad, rows = numbers(int(counts.sum()), 12, seed=seed, decades=4), numbers(int(counts.sum()), 20, seed=seed + 100)
    whole = quantize_tiles(grad, transposed=True), quantize_tiles(rows, transposed=True)
    wanted = fp8_grouped_weight_grad(*whole, counts, torch.float32)
    in_first = torch.cat([torch.arange(c) < f for c, f in zip(counts.tolist(), first.tolist(), strict=True)])
    total = torch.zeros_like(wanted)
    for mine, each in ((in_first, first), (~in_first, counts - first)):
        batch = quantize_tiles(grad[mine], transposed=True), quantize_tiles(rows[mine], transposed=True)
        for part, of in zip(batch, whole, strict=True):
            assert torch.equal(part.codes.float(), of.codes.float()[:, mine])
            assert torch.equal(part.scales, of.scales[:, mine[::128]])
        total += fp8_grouped_weight_grad(*batch, each, torch.float32)
    limit = 2 * (int(counts.max()) + 4) * EPS * torch.stack([sizes(*pair) for pair in of_columns(*whole, counts)])
    assert ((total - wanted).abs() <= limit).all()


def test_mistakes_are_named():
    counts = torch.tensor([128, 256])
    rows, weight = quantize_tiles(torch.ones(384, 200)), quantize_blocks(torch.ones(2, 130, 200))
    with pytest.raises(ValueError, match="sum to 383, but there are 384 rows"):
        fp8_grouped_matmul(rows, weight, torch.tensor([128, 255]), torch.float32)
    with pytest.raises(ValueError, match="3 experts, but the weight has 2"):
        fp8_grouped_matmul(rows, weight, torch.tensor([128, 255, 1]), torch.float32)
    with pytest.raises(ValueError, match=r"it is \[experts, outputs, 200\]"):
        fp8_grouped_matmul(rows, quantize_blocks(torch.ones(2, 130, 199)), counts, torch.float32)
    with pytest.raises(ValueError, match=r"scales of the weight are \[2, 1, 2\], not \[2, 2, 2\]"):
        fp8_grouped_matmul(rows, Quantized(weight.codes, weight.scales[:, :1]), counts, torch.float32)
    with pytest.raises(ValueError, match=r"scales of the rows are \[384, 1\], not \[384, 2\]"):
        fp8_grouped_matmul(Quantized(rows.codes, rows.scales[:, :1]), weight, counts, torch.float32)

    columns = quantize_tiles(torch.ones(5, 384))
    with pytest.raises(ValueError, match=r"experts of \[100, 284\] rows do not have whole tiles"):
        fp8_grouped_weight_grad(columns, columns, torch.tensor([100, 284]), torch.float32)
    with pytest.raises(ValueError, match="sum to 256, but there are 384 rows"):
        fp8_grouped_weight_grad(columns, columns, torch.tensor([128, 128]), torch.float32)
    with pytest.raises(ValueError, match="a gradient at 384 rows, but there are 256"):
        fp8_grouped_weight_grad(columns, quantize_tiles(torch.ones(5, 256)), counts, torch.float32)
    with pytest.raises(ValueError, match=r"scales of the gradient are \[5, 2\], not \[5, 3\]"):
        fp8_grouped_weight_grad(Quantized(columns.codes, columns.scales[:, :2]), columns, counts, torch.float32)


CASES = [([130, 0, 7], 140, 300), ([5], 1, 1), ([0, 0], 8, 8), ([3, 2], 8, 0), ([0, 128, 0], 130, 128)]


@pytest.mark.parametrize(("split", "outputs", "inputs"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [guarded, strided])
def test_the_kernels_give_the_products_of_the_twins(split, outputs, inputs, dtype, held):
    counts = torch.tensor(split)
    rows, weight = (Quantized(*map(held, each)) for each in drawn(counts, outputs, inputs, seed=1))
    twin, kernel = on_both(lambda: fp8_grouped_matmul(rows, weight, counts.to(DEVICE), dtype))
    assert (kernel.dtype, kernel.shape) == (dtype, (sum(split), outputs))
    assert distance(kernel, twin) <= room(dtype, inputs)

    *columns, padded = drawn_columns(counts, outputs, inputs, seed=1)
    grad, rows = (Quantized(*map(held, each)) for each in columns)
    twin, kernel = on_both(lambda: fp8_grouped_weight_grad(grad, rows, padded.to(DEVICE), dtype))
    assert (kernel.dtype, kernel.shape) == (dtype, (len(split), outputs, inputs))
    assert distance(kernel, twin) <= room(dtype, int(padded.max()))


def test_the_kernel_does_for_each_expert_what_fp8_matmul_does():
    counts = torch.tensor([130, 0, 7])
    rows, weight = drawn(counts, 140, 200, seed=1)
    with kernels.use("triton"):
        y = fp8_grouped_matmul(
            Quantized(*map(guarded, rows)), Quantized(*map(guarded, weight)), counts.to(DEVICE), torch.float32
        )
        each = [
            fp8_matmul(Quantized(*map(guarded, mine)), Quantized(*map(guarded, matrix)), torch.float32)
            for mine, matrix in of_experts(rows, weight, counts)
        ]
    assert same_bits(y, torch.cat(each))


def test_programs_in_groups_compute_every_block_of_a_transposed_weight():
    counts = torch.tensor([1] * 5 + [0] + [2] * 5)
    grad = quantize_tiles(numbers(15, 3, seed=1))
    weight = Quantized(*(guarded(each).transpose(1, 2) for each in quantize_blocks(numbers(11, 3, 140, seed=2))))
    twin, kernel = on_both(
        lambda: fp8_grouped_matmul(Quantized(*map(guarded, grad)), weight, counts.to(DEVICE), torch.float32)
    )
    assert distance(kernel, twin) <= room(torch.float32, 3)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_torch_knows_the_operations(path):
    counts = torch.tensor([5, 0, 3])
    rows, weight = drawn(counts, 12, 130, seed=1)
    grad, columns, padded = drawn_columns(counts, 12, 130, seed=1)
    rows, weight, grad, columns = (Quantized(*(t.to(DEVICE) for t in m)) for m in (rows, weight, grad, columns))
    counts, padded, ops = counts.to(DEVICE), padded.to(DEVICE), torch.ops.tangram
    with kernels.use(path):
        for op, args, shape in (
            (ops.fp8_grouped_matmul, (*rows, *weight, counts), (8, 12)),
            (ops.fp8_grouped_weight_grad, (*grad, *columns, padded), (3, 12, 130)),
        ):
            opcheck_of_codes(op, (*args, torch.bfloat16))
            y = op(*(each.to("meta") for each in args), torch.bfloat16)
            assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, shape)

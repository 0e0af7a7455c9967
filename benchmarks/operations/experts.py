"""Cases of the grouped products, in FP8 and in the dtype of activations: rows sorted by expert, a matrix for each."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from operations.case import Case, Function, Peer, room, sums, within
from operations.products import decoded, passes
from operations.scale import Scale
from tangram.kernels import (
    Quantized,
    fp8_grouped_matmul,
    fp8_grouped_weight_grad,
    grouped_matmul_forward,
    grouped_matmul_input_grad,
    grouped_matmul_weight_grad,
    quantize_blocks,
    quantize_tiles,
)


def cases(scale: Scale) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield them."""
    for outputs, inputs in scale.expert_linears:
        yield "fp8_grouped_matmul, forward", partial(_fp8_rows, scale, "forward", outputs, inputs)
        yield "fp8_grouped_matmul, input gradient", partial(_fp8_rows, scale, "input gradient", inputs, outputs)
        yield "fp8_grouped_weight_grad", partial(_fp8_weights, scale, outputs, inputs)
    for outputs, inputs in scale.expert_linears:
        yield "grouped_matmul, forward", partial(_rows, scale, "forward", outputs, inputs)
        yield "grouped_matmul, input gradient", partial(_rows, scale, "input gradient", inputs, outputs)
        yield "grouped_matmul, weight gradient", partial(_weights, scale, outputs, inputs)


def by_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """Return every expert's rows times its transposed matrix, for experts with equal shares."""
    return torch.cat([part @ matrix.t() for part, matrix in zip(rows.chunk(len(weight)), weight, strict=True)])


def _counts(scale: Scale) -> Tensor:
    return torch.full((scale.experts,), scale.expert_rows, device=scale.device)


def _ends(scale: Scale) -> Tensor:
    return _counts(scale).cumsum(0, dtype=torch.int32)


def _shape(scale: Scale, outputs: int, inputs: int) -> str:
    return f"{scale.experts} x ({scale.expert_rows} x {outputs} x {inputs})"


def _flops(scale: Scale, outputs: int, inputs: int) -> float:
    return 2.0 * scale.experts * scale.expert_rows * outputs * inputs


def _fp8_rows(scale: Scale, name: str, outputs: int, inputs: int) -> Case:
    plain = scale.draw(scale.experts * scale.expert_rows, inputs), scale.draw(scale.experts, outputs, inputs)
    counts, ends = _counts(scale), _ends(scale)

    def ours(rows: Tensor, rows_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
        pair = Quantized(rows, rows_scales), Quantized(weight, weight_scales)
        return fp8_grouped_matmul(*pair, counts, scale.dtype, passes(scale))

    def formula(rows: Tensor, rows_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
        wide = torch.float64 if rows_scales.dtype is torch.float64 else scale.dtype
        return by_rows(decoded(rows, rows_scales, wide), decoded(weight, weight_scales, wide))

    return Case(
        operation=f"fp8_grouped_matmul, {name}",
        shape=_shape(scale, outputs, inputs),
        inputs=(*quantize_tiles(plain[0]), *quantize_blocks(plain[1])),
        ours=ours,
        formula=formula,
        check=within(room(scale.dtype, inputs, scale.device)),
        flops=_flops(scale, outputs, inputs),
        peers={
            "F.grouped_mm": Peer(lambda: lambda *_: F.grouped_mm(plain[0], plain[1].mT, offs=ends)),
            "F.scaled_grouped_mm, rows": Peer(partial(_scaled_rows, *plain, ends, scale.dtype)),
        },
    )


def _fp8_weights(scale: Scale, outputs: int, inputs: int) -> Case:
    total = scale.experts * scale.expert_rows  # whole tiles: nothing is padded
    grad, rows = scale.draw(total, outputs), scale.draw(total, inputs)
    counts, ends = _counts(scale), _ends(scale)

    def ours(grad: Tensor, grad_scales: Tensor, rows: Tensor, rows_scales: Tensor) -> Tensor:
        pair = Quantized(grad, grad_scales), Quantized(rows, rows_scales)
        return fp8_grouped_weight_grad(*pair, counts, torch.float32, passes(scale))

    def formula(grad: Tensor, grad_scales: Tensor, rows: Tensor, rows_scales: Tensor) -> Tensor:
        wide = torch.float64 if grad_scales.dtype is torch.float64 else scale.dtype
        return _by_columns(decoded(grad, grad_scales, wide), decoded(rows, rows_scales, wide).t(), scale.experts)

    return Case(
        operation="fp8_grouped_weight_grad",
        shape=_shape(scale, outputs, inputs),
        inputs=(*quantize_tiles(grad, transposed=True), *quantize_tiles(rows, transposed=True)),
        ours=ours,
        formula=formula,
        check=within(room(torch.float32, scale.expert_rows, scale.device)),
        flops=_flops(scale, outputs, inputs),
        peers={"F.grouped_mm": Peer(lambda: lambda *_: F.grouped_mm(grad.t(), rows, offs=ends))},
    )


def _rows(scale: Scale, name: str, outputs: int, inputs: int) -> Case:
    counts, ends = _counts(scale), _ends(scale)
    rows = scale.draw(scale.experts * scale.expert_rows, inputs)
    if name == "forward":
        weight = scale.draw(scale.experts, outputs, inputs)
        return _grouped(
            scale,
            (name, outputs, inputs),
            (rows, weight),
            lambda rows, weight: grouped_matmul_forward(rows, weight, counts),
            by_rows,
            lambda rows, weight: F.grouped_mm(rows, weight.mT, offs=ends),
        )
    weight = scale.draw(scale.experts, inputs, outputs)
    return _grouped(
        scale,
        (name, outputs, inputs),
        (rows, weight),
        lambda rows, weight: grouped_matmul_input_grad(rows, weight, counts),
        lambda rows, weight: by_rows(rows, weight.mT),
        lambda rows, weight: F.grouped_mm(rows, weight, offs=ends),
    )


def _weights(scale: Scale, outputs: int, inputs: int) -> Case:
    counts, ends = _counts(scale), _ends(scale)
    total = scale.experts * scale.expert_rows
    return _grouped(
        scale,
        ("weight gradient", outputs, inputs),
        (scale.draw(total, outputs), scale.draw(total, inputs)),
        lambda grad, rows: grouped_matmul_weight_grad(grad, rows, counts),
        lambda grad, rows: _by_columns(grad.t(), rows, scale.experts),
        lambda grad, rows: F.grouped_mm(grad.t(), rows, offs=ends),
    )


def _grouped(
    scale: Scale,
    product: tuple[str, int, int],
    inputs: tuple[Tensor, ...],
    ours: Function,
    formula: Callable[..., Tensor],
    fused: Function,
) -> Case:
    name, outputs, depth = product
    terms = scale.expert_rows if name == "weight gradient" else depth
    return Case(
        operation=f"grouped_matmul, {name}",
        shape=_shape(scale, outputs, depth),
        inputs=inputs,
        ours=ours,
        formula=formula,
        check=sums(terms, lambda: formula(*(t.double().abs() for t in inputs))),
        flops=_flops(scale, outputs, depth),
        peers={"F.grouped_mm": Peer(lambda: fused)},
        fuses=False,
    )


def _by_columns(left: Tensor, right: Tensor, experts: int) -> Tensor:
    """Return left [N, M] times right [M, K] over each expert's share of M."""
    return torch.stack([one @ other for one, other in zip(left.chunk(experts, 1), right.chunk(experts), strict=True)])


def _scaled_rows(rows: Tensor, weight: Tensor, ends: Tensor, dtype: torch.dtype) -> Function:
    kind = F.ScalingType.RowWise
    (a, a_scales), (b, b_scales) = _row_wise(rows), _row_wise(weight)
    return lambda *_: F.scaled_grouped_mm(a, b.mT, a_scales, kind, b_scales, kind, offs=ends, output_dtype=dtype)


def _row_wise(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.float().abs().amax(-1) / 448
    return (x.float() / scales.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn), scales

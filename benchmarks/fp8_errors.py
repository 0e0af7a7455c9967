"""How far products in FP8 are from exact ones: by what is multiplied, how it is scaled, and how it is summed.

    python benchmarks/fp8_errors.py

Everything is drawn from fixed seeds, so that the figures are the same on every machine.
"""

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tangram.kernels import (
    Quantized,
    dequantize,
    fp8_matmul,
    limited_product,
    pack_e5m6,
    quantize_blocks,
    quantize_tiles,
    unpack_e5m6,
)

ROWS, DEPTH, COLUMNS = 256, 2048, 512
E5M2 = torch.float8_e5m2


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> dict[str, Tensor]:
    """Return matrices [ROWS, DEPTH] as they occur: even, with large channels, with large tokens, with few giants."""
    channels, tokens, giants = (normal(ROWS, DEPTH, seed=1) for _ in range(3))
    channels[:, ::97] *= 100
    tokens[::16] *= 1000
    far = {}
    for power in (4, 5, 6):
        far[f"four elements of 1e{power}"] = giants.clone()
        for i in range(4):
            far[f"four elements of 1e{power}"][64 * i, 500 * i] = 10.0**power
    return {"normal": normal(ROWS, DEPTH, seed=1), "channels x100": channels, "tokens x1000": tokens, **far}


def products(x: Tensor, w: Tensor) -> dict[str, Tensor]:
    """Return x w^T by each way of multiplying."""
    block = quantize_blocks(w)

    def fp8(b: Quantized, **how: object) -> Tensor:
        return fp8_matmul(quantize_tiles(x, **how), b, torch.float32)  # type: ignore[arg-type]

    return {
        "bfloat16": (x.bfloat16().float() @ w.bfloat16().float().t()).bfloat16(),
        "tile": fp8(block),
        "tile, powers of two": fp8(quantize_blocks(w, power_of_two=True), power_of_two=True),
        "row": fp8(block, shared="row"),
        "tensor": fp8(quantize_blocks(w, whole=True), shared="tensor"),
        "tile, E5M2": fp8(quantize_blocks(w, format=E5M2), format=E5M2),
    }


def median_row(got: Tensor, exact: Tensor) -> float:
    """Return the relative error of the row in the middle: a whole matrix would show its largest rows alone."""
    return float(((got.double() - exact).norm(dim=1) / exact.norm(dim=1)).median())


def by_input() -> Table:
    w = 0.02 * normal(COLUMNS, DEPTH, seed=2)
    table = Table(title="Relative error of the median row of x [256, 2048] times w [512, 2048] transposed")
    table.add_column("x")
    for at, (name, x) in enumerate(inputs().items()):
        results = products(x, w)
        if at == 0:
            for way in results:
                table.add_column(way, justify="right")
        exact = x.double() @ w.double().t()
        table.add_row(name, *(f"{median_row(got, exact):.1e}" for got in results.values()))
    return table


def by_length() -> Table:
    table = Table(title="Largest relative error of a sum of positive products, of the operands as they were rounded")
    for column in ("length", "short sums", "promoted every 128"):
        table.add_column(column, justify="right")
    for length in (1024, 2048, 4096, 8192):
        a, b = quantize_tiles(normal(64, length, seed=3).abs()), quantize_blocks(normal(64, length, seed=4).abs())
        left, right = dequantize(*a, (1, 128)), dequantize(*b, (128, 128))
        exact = left.double() @ right.double().t()
        errors = [
            float(((got.double() - exact).abs() / exact).max())
            for got in (limited_product(left, right), fp8_matmul(a, b, torch.float32))
        ]
        table.add_row(f"{length:,}", *(f"{error:.1e}" for error in errors))
    return table


def of_what_is_kept() -> Table:
    table = Table(title="What backward gets of the input of a linear, against the input: relative error")
    for column in ("kept as", "bytes a number", "as it was kept", "rounded again across"):
        table.add_column(column, justify="left" if column == "kept as" else "right")
    x = normal(ROWS, DEPTH, seed=5)
    kept = {
        "E4M3": (1.0, dequantize(*quantize_tiles(x), (1, 128)), False),
        "E4M3, powers of two": (1.0, dequantize(*quantize_tiles(x, power_of_two=True), (1, 128)), True),
        "E5M6, powers of two": (1.5, unpack_e5m6(*pack_e5m6(x), DEPTH, torch.float32), True),
    }
    for name, (size, back, two) in kept.items():
        across = dequantize(*quantize_tiles(back, power_of_two=two, transposed=True), (1, 128)).t()
        errors = [float((got - x).norm() / x.norm()) for got in (back, across)]
        table.add_row(name, f"{size:g}", *(f"{error:.1e}" for error in errors))
    return table


def main() -> None:
    console = Console(width=140)
    for table in (by_input(), by_length(), of_what_is_kept()):
        console.print(table)


if __name__ == "__main__":
    main()

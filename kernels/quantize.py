"""Matrices in FP8 with a scale for each tile (arXiv:2412.19437, section 3.3.2, and the released checkpoint).

A tile of numbers x is kept as codes q and one float32 scale s, its largest magnitude over the largest code:

    s = max(|x|, 1e-4) / 448        q = round(x / s)        x ~ q s

A tile is 1 x 128 of an activation, along the dimension that a product sums over, or 128 x 128 of a weight. A ragged
tile at the right or lower edge counts as padded with zeros. E4M3 has three bits of mantissa and its smallest normal
number is 2^-6, so |x - q s| is at most 2^-4 |x|, or 2^-10 s where that is more.
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tangram.kernels.backend import takes_kernel
from tangram.kernels.jit import tl, triton

SMALLEST_PEAK = 1e-4
"""What the largest magnitude of a tile is taken to be at least: a tile of zeros has a scale too."""

E4M3 = torch.float8_e4m3fn

Shared = Literal["tile", "block", "row", "tensor"]

_TILES = 64
"""Tiles that one program of the kernel quantises."""


def largest(format: torch.dtype) -> float:
    """Return the largest number of an FP8 format: 448 of E4M3, 57344 of E5M2."""
    return float(torch.finfo(format).max)


class Passes(Protocol):
    """The passes over a matrix that quantising is made of: in plain torch, or compiled (kernels/native.py)."""

    def peaks(self, x: Tensor, tile: int) -> Tensor:
        """Return the largest magnitude of each tile of 1 x `tile`, float32 [R, tiles], of x [R, K]."""
        ...

    def encode(self, x: Tensor, scales: Tensor, tile: int, format: torch.dtype) -> Tensor:
        """Return the codes [R, K] of x [R, K] over the scales [R, tiles] of its tiles."""
        ...

    def decode(self, codes: Tensor, scales: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
        """Return codes [R, K] times the scales [R, tiles] of their tiles, rounded once to `dtype`."""
        ...

    def column_peaks(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return the largest magnitude in each column of each group of rows, float32 [G, K], of x [R, K].

        `ends` has the row after the last of each group, int64 [G] on the CPU.
        """
        ...

    def round_columns(self, x: Tensor, scales: Tensor, ends: Tensor, format: torch.dtype) -> Tensor:
        """Return x [R, K] encoded and decoded with a scale [G, K] for each column of each group, in its dtype."""
        ...


class Plain:
    """The passes as torch runs them one operation after the other."""

    def peaks(self, x: Tensor, tile: int) -> Tensor:
        """Return the largest magnitude of each tile."""
        tiles = -(-x.shape[1] // tile)
        padded = F.pad(x, (0, tiles * tile - x.shape[1]))
        return padded.unflatten(1, (tiles, tile)).abs().amax(2).float()

    def encode(self, x: Tensor, scales: Tensor, tile: int, format: torch.dtype) -> Tensor:
        """Return the codes."""
        bound = largest(format)
        return (x.float() / _spread(scales, tile, x.shape[1])).clamp(-bound, bound).to(format)

    def decode(self, codes: Tensor, scales: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
        """Return the numbers."""
        return codes.float().mul_(_spread(scales, tile, codes.shape[1])).to(dtype)

    def column_peaks(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return the largest magnitude of each column of each group."""
        return torch.stack([group.abs().amax(0).float() for group in x.split(_sizes(ends))])

    def round_columns(self, x: Tensor, scales: Tensor, ends: Tensor, format: torch.dtype) -> Tensor:
        """Return the rounded numbers."""
        each = scales.repeat_interleave(torch.tensor(_sizes(ends), device=scales.device), 0)
        bound = largest(format)
        return ((x.float() / each).clamp(-bound, bound).to(format).float() * each).to(x.dtype)


PLAIN: Passes = Plain()


def _sizes(ends: Tensor) -> list[int]:
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def _spread(scales: Tensor, tile: int, columns: int) -> Tensor:
    """Return the scale of every column of [R, tiles], [R, columns]."""
    return scales.repeat_interleave(tile, 1)[:, :columns]


class Scaling(NamedTuple):
    """How an operand of a product is quantised.

    Attributes:
        format: float8_e4m3fn, or float8_e5m2 with more range and a bit less of mantissa.
        shared: What has one scale: a tile, the tiles of `tile` rows (a square block), a whole row, or all of it.
        power_of_two: Every scale is rounded up to a power of two.
    """

    format: torch.dtype = E4M3
    shared: Shared = "tile"
    power_of_two: bool = False


TILES = Scaling()
"""E4M3 in tiles with a scale of their own, as DeepSeek-V3 has it."""


class Quantized(NamedTuple):
    """A matrix in FP8.

    Attributes:
        codes: FP8 numbers, [..., M, K].
        scales: What multiplies them to give the matrix, float32, one for each tile.
    """

    codes: Tensor
    scales: Tensor


def quantize_tiles(
    x: Tensor,
    tile: int = 128,
    power_of_two: bool = False,
    transposed: bool = False,
    *,
    format: torch.dtype = E4M3,
    shared: Shared = "tile",
    passes: Passes = PLAIN,
) -> Quantized:
    """Return the codes and scales of a finite matrix in tiles of 1 x `tile`.

    The Triton kernel does tiles with a scale of their own, in E4M3; the other ways run in plain torch anywhere.

    Args:
        x: The matrix [M, K].
        tile: Columns of a tile.
        power_of_two: Round every scale up to a power of two.
        transposed: Quantise the transposed matrix: tiles of `tile` x 1 of `x`.
        format: float8_e4m3fn, or float8_e5m2 with more range and a bit less of mantissa.
        shared: What has one scale: a tile, the tiles of `tile` rows (a square block), a whole row, or all of it.
        passes: How the passes over the matrix run.

    Returns:
        Codes [M, K] and scales float32 [M, ceil(K / tile)]; transposed, codes [K, M] and scales [K, ceil(M / tile)].
    """
    if shared == "tile" and format is E4M3 and takes_kernel(x):
        return Quantized(*torch.ops.tangram.quantize_tiles(x, tile, power_of_two, transposed))
    return _tiles(x, tile, power_of_two, transposed, format, shared, passes)


def quantize_blocks(
    w: Tensor,
    block: int = 128,
    power_of_two: bool = False,
    *,
    format: torch.dtype = E4M3,
    whole: bool = False,
    passes: Passes = PLAIN,
) -> Quantized:
    """Return the codes and the scales of finite matrices, their blocks `block` rows by `block` columns.

    Args:
        w: The matrix [N, K], or several of them [E, N, K].
        block: Side of a block.
        power_of_two: Round every scale up to a power of two.
        format: float8_e4m3fn or float8_e5m2.
        whole: All blocks of a matrix have one scale; this runs in plain torch anywhere.
        passes: How the passes over the matrix run.

    Returns:
        Codes [..., N, K], and scales float32 [..., ceil(N / block), ceil(K / block)] that multiply them.
    """
    if format is E4M3 and not whole and takes_kernel(w):
        return Quantized(*torch.ops.tangram.quantize_blocks(w, block, power_of_two))
    return _blocks(w, block, power_of_two, format, whole, passes)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    tile: tuple[int, int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    passes: Passes = PLAIN,
) -> Tensor:
    """Return the numbers that codes and scales stand for, [..., N, K], rounded once to `dtype`.

    Args:
        codes: [..., N, K].
        scales: One for each tile, [..., ceil(N / tile[0]), ceil(K / tile[1])].
        tile: Rows and columns that share a scale; (1, 128) or (128, 128) if left out, whichever the shapes say.
        dtype: Of the result.
        passes: How the passes over the matrix run.

    Raises:
        ValueError: The scales do not fit the codes, or the shapes leave open which tiles they are of.
    """
    rows, columns = codes.shape[-2:]
    tile = _tile_of(rows, columns, tuple(scales.shape[-2:])) if tile is None else tile
    wanted = (-(-rows // tile[0]), -(-columns // tile[1]))
    if scales.shape[-2:] != wanted or scales.shape[:-2] != codes.shape[:-2]:
        raise ValueError(f"codes {list(codes.shape)} in tiles of {tile} have scales {wanted}, not {list(scales.shape)}")
    each = _for_each_row(scales.float(), tile[0], rows)
    return passes.decode(codes.flatten(0, -2).contiguous(), each.flatten(0, -2).contiguous(), tile[1], dtype).view(
        codes.shape
    )


def _tile_of(rows: int, columns: int, given: tuple[int, ...]) -> tuple[int, int]:
    known = [tile for tile in ((1, 128), (128, 128)) if given == (-(-rows // tile[0]), -(-columns // tile[1]))]
    if len(known) == 1 or (known and rows == 1):
        return known[0]
    raise ValueError(f"scales {list(given)} do not say in which tiles codes [{rows}, {columns}] are; pass `tile`")


def _tiles(
    x: Tensor, tile: int, power_of_two: bool, transposed: bool, format: torch.dtype, shared: Shared, passes: Passes
) -> Quantized:
    x = (x.t() if transposed else x).contiguous()
    peaks = shared_peaks(passes.peaks(x, tile), shared, tile)  # [M, tiles]
    scales = scales_of(peaks, power_of_two, format).contiguous()
    return Quantized(passes.encode(x, scales, tile, format), scales)


def shared_peaks(peaks: Tensor, shared: Shared, tile: int) -> Tensor:
    """Return, for each tile of a matrix, the largest magnitude of all that has one scale with it, [M, tiles]."""
    if not peaks.numel():
        return peaks
    match shared:
        case "tile":
            return peaks
        case "block":
            return _for_each_row(_pooled(peaks, tile), tile, len(peaks))
        case "row":
            return peaks.amax(1, keepdim=True).expand_as(peaks)
        case "tensor":
            return peaks.amax().expand_as(peaks)


def _blocks(w: Tensor, block: int, power_of_two: bool, format: torch.dtype, whole: bool, passes: Passes) -> Quantized:
    rows = w.shape[-2]
    flat = w.flatten(0, -2).contiguous()
    peaks = passes.peaks(flat, block)  # [E * N, tiles]
    pooled = _pooled(peaks.view(*w.shape[:-1], peaks.shape[1]), block)  # [..., down, across]
    if whole and pooled.numel():
        pooled = pooled.amax((-2, -1), keepdim=True).expand_as(pooled).contiguous()
    scales = scales_of(pooled, power_of_two, format)
    each = _for_each_row(scales, block, rows)
    return Quantized(passes.encode(flat, each.flatten(0, -2), block, format).view(w.shape), scales)


def _pooled(peaks: Tensor, block: int) -> Tensor:
    """Return the largest of every `block` rows of [..., N, tiles], [..., ceil(N / block), tiles]."""
    padded = F.pad(peaks, (0, 0, 0, -peaks.shape[-2] % block))
    return padded.unflatten(-2, (-1, block)).amax(-2)


def _for_each_row(scales: Tensor, block: int, rows: int) -> Tensor:
    """Return the scales [..., ceil(N / block), tiles] for each of the N `rows`, [..., N, tiles]."""
    return scales if block == 1 else scales.repeat_interleave(block, -2)[..., :rows, :]


def scales_of(peaks: Tensor, power_of_two: bool, format: torch.dtype) -> Tensor:
    """Return the scales of tiles whose largest magnitudes are `peaks`, float32."""
    scales = peaks.clamp_min(SMALLEST_PEAK) / largest(format)
    return powers_of_two(scales) if power_of_two else scales


def powers_of_two(scales: Tensor) -> Tensor:
    """Return positive normal float32 numbers rounded up to powers of two."""
    # By the bits: a logarithm would be off at the powers themselves.
    return ((scales.contiguous().view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


@triton.jit
def tile_scales(peaks, bound: tl.constexpr, smallest: tl.constexpr, power_of_two: tl.constexpr):
    """Return, in a kernel, the scales of tiles whose largest magnitudes are `peaks`, float32."""
    peaks = tl.maximum(peaks, smallest)
    scale = tl.div_rn(peaks, tl.zeros_like(peaks) + bound)
    if power_of_two:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def tile_codes(values, scale, bound: tl.constexpr):
    """Return, in a kernel, float32 `values` over their scales, ready to be rounded to codes."""
    return tl.minimum(tl.maximum(tl.div_rn(values, tl.zeros_like(values) + scale), -bound), bound)


@triton.jit
def _quantize(
    x,
    codes,
    scales,
    rows,
    columns,
    across,
    stride_matrix,
    stride_row,
    stride_column,
    bound: tl.constexpr,
    smallest: tl.constexpr,
    tile: tl.constexpr,
    height: tl.constexpr,
    square: tl.constexpr,
    power_of_two: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # One program quantises `height` rows of one column of tiles: as many tiles, or one square block.
    matrix = tl.program_id(2).to(tl.int64)
    inner_row, inner_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row = tl.program_id(0) * height + inner_row
    column = tl.program_id(1) * tile + inner_column
    row_inside = (inner_row < height) & (row < rows)
    inside = row_inside[:, None] & ((inner_column < tile) & (column < columns))[None, :]
    row, column = row.to(tl.int64), column.to(tl.int64)
    at = matrix * stride_matrix + row[:, None] * stride_row + column[None, :] * stride_column
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    peaks = tl.max(tl.abs(values), 1)
    if square:
        peaks = tl.zeros_like(peaks) + tl.max(peaks, 0)
    scale = tile_scales(peaks, bound, smallest, power_of_two)
    coded = tile_codes(values, scale[:, None], bound)
    out = matrix * rows * columns + row[:, None] * columns + column[None, :]
    tl.store(codes + out, coded.to(codes.dtype.element_ty), mask=inside)
    if square:
        first = matrix * tl.num_programs(0) + tl.program_id(0)
        tl.store(scales + (first * across + tl.program_id(1) + inner_row), scale, mask=inner_row == 0)
    else:
        tl.store(scales + (row * across + tl.program_id(1)), scale, mask=row_inside)


def _launch(x: Tensor, tile: int, height: int, square: bool, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Quantise matrices [E, M, K] of any strides in tiles of 1 or `height` rows."""
    matrices, rows, columns = x.shape
    down, across = -(-rows // height), -(-columns // tile)
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scales = torch.empty(matrices, down if square else rows, across, dtype=torch.float32, device=x.device)
    if x.numel():
        _quantize[(down, across, matrices)](
            x,
            codes,
            scales,
            rows,
            columns,
            across,
            *x.stride(),
            bound=largest(E4M3),
            smallest=SMALLEST_PEAK,
            tile=tile,
            height=height,
            square=square,
            power_of_two=power_of_two,
            ROWS=triton.next_power_of_2(height),
            COLUMNS=triton.next_power_of_2(tile),
        )
    return codes, scales


@torch.library.custom_op("tangram::quantize_tiles", mutates_args=())
def _quantize_tiles(x: Tensor, tile: int, power_of_two: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    if not takes_kernel(x):
        return _tiles(x, tile, power_of_two, transposed, E4M3, "tile", PLAIN)
    codes, scales = _launch((x.t() if transposed else x)[None], tile, _TILES, False, power_of_two)
    return codes[0], scales[0]


@_quantize_tiles.register_fake
def _(x: Tensor, tile: int, power_of_two: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    rows, columns = (x.t() if transposed else x).shape
    return x.new_empty(rows, columns, dtype=E4M3), x.new_empty(rows, -(-columns // tile), dtype=torch.float32)


@torch.library.custom_op("tangram::quantize_blocks", mutates_args=())
def _quantize_blocks(w: Tensor, block: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if not takes_kernel(w):
        return _blocks(w, block, power_of_two, E4M3, False, PLAIN)
    codes, scales = _launch(w[None] if w.dim() == 2 else w, block, block, True, power_of_two)
    return codes.view(w.shape), scales.view(*w.shape[:-2], *scales.shape[-2:])


@_quantize_blocks.register_fake
def _(w: Tensor, block: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, columns = w.shape[-2:]
    scales = *w.shape[:-2], -(-rows // block), -(-columns // block)
    return w.new_empty(w.shape, dtype=E4M3), w.new_empty(scales, dtype=torch.float32)

"""Which block of its result a program of a matrix product computes."""

from tangram.kernels.jit import tl, triton


@triton.jit
def block_of(program, down, across, GROUP: tl.constexpr):
    """Return the row and the column of a program's block, of `down` times `across`.

    Programs of neighbouring numbers run at one time. They are given GROUP blocks of one column, then of the next, so
    that they read few rows and few columns and find them in the cache.
    """
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = program % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def expert_of(block, counts, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Return the expert of a block of ROWS rows, its first row, the block's first and the one after the expert's last.

    Every expert has its own blocks, the last one ragged. Beyond the last expert's the expert is one that is not there:
    how many blocks there are is known on the device alone, so that more programs start.

    Args:
        block: Place in the blocks of all experts.
        counts: Rows of each expert, contiguous integers [experts].
        experts: How many there are.
        ROWS: Rows of a block.
        EXPERTS: A power of two that is no less than `experts`.
    """
    each = tl.arange(0, EXPERTS)
    sizes = tl.load(counts + each, mask=each < experts, other=0).to(tl.int32)
    blocks = (sizes + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    start = tl.sum(tl.where(each < expert, sizes, 0), 0)
    first = start + (block - tl.sum(tl.where(each < expert, blocks, 0), 0)) * ROWS
    return expert, first, start + tl.sum(tl.where(each == expert, sizes, 0), 0)


@triton.jit
def rows_of(expert, counts, experts, EXPERTS: tl.constexpr):
    """Return the first row of an expert and how many it has."""
    each = tl.arange(0, EXPERTS)
    sizes = tl.load(counts + each, mask=each < experts, other=0).to(tl.int32)
    start = tl.sum(tl.where(each < expert, sizes, 0), 0)
    return start, tl.sum(tl.where(each == expert, sizes, 0), 0)


def most_blocks(rows: int, experts: int, height: int) -> int:
    """Return the most blocks of `height` rows that experts may have, however they share the rows."""
    return -(-rows // height) + experts - 1

"""What benchmarks/kernels.py measures: the operations, their formulas in plain torch, and their peers."""

from collections.abc import Iterator

from operations import decoding, elements, experts, head, optimizer, products, quantising
from operations.case import Case
from operations.scale import Scale

_PARTS = {
    "quantise": quantising.cases,
    "FP8 products": products.cases,
    "grouped products": experts.cases,
    "elements": elements.cases,
    "head": head.cases,
    "decoding": decoding.cases,
    "optimizer": optimizer.cases,
}


def cases(scale: Scale, only: str) -> Iterator[tuple[str, Case]]:
    """Yield every case with the title of its table; those alone whose operation contains `only`.

    One after the other: the tensors of a case are drawn when it is asked for.
    """
    for title, part in _PARTS.items():
        for name, make in part(scale):
            if only in name:
                yield title, make()

"""What benchmarks/kernels.py measures: the operations, their formulas in plain torch, and their peers."""

from collections.abc import Callable, Iterator

from operations import decoding, elements, experts, head, optimizer, products, quantising
from operations.case import Case
from operations.scale import Scale

_PARTS: dict[str, Callable[[Scale], Iterator[tuple[str, Callable[[], Case]]]]] = {
    "Quantising": quantising.cases,
    "Products in FP8": products.cases,
    "Grouped products": experts.cases,
    "Norm, activation, rotation, tokens to experts and back": elements.cases,
    "Head": head.cases,
    "Decoding": decoding.cases,
    "Optimizer": optimizer.cases,
}


def cases(scale: Scale, only: str) -> Iterator[tuple[str, Case]]:
    """Yield every case with the title of its table; those alone whose operation contains `only`.

    One after the other: the tensors of a case are drawn when it is asked for.
    """
    for title, part in _PARTS.items():
        for name, make in part(scale):
            if only in name:
                yield title, make()


def names(scale: Scale) -> list[str]:
    """Return the operation of every case, without drawing a tensor."""
    return [name for part in _PARTS.values() for name, _ in part(scale)]

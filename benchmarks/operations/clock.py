"""How long a call takes, and what the machine could do at best."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches in its simplest work.

    Attributes:
        copied: Bytes a second, read and written, of a copy.
        multiplied: Floating-point operations a second of a product of square matrices.
    """

    copied: float
    multiplied: float

    def share(self, seconds: float, moved: float, flops: float) -> tuple[float, str]:
        """Return the least time that the ceilings leave over the time taken, and which of them is the nearer."""
        by_copy, by_product = moved / self.copied, flops / self.multiplied
        return max(by_copy, by_product) / seconds, "copy" if by_copy >= by_product else "product"


class GPUClock:
    """Medians of triton's do_bench, which empties the cache between calls."""

    said = "median of triton.testing.do_bench, 200 ms a side"

    def seconds(self, sides: Mapping[str, Call]) -> dict[str, float]:
        """Return the median time of a call of each side."""
        from triton.testing import do_bench

        return {name: do_bench(call, warmup=50, rep=200, return_mode="median") / 1000 for name, call in sides.items()}


class CPUClock:
    """Medians of the CPU time of calls that take turns.

    Args:
        budget: CPU seconds for all sides of a case together.
    """

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self.said = "median of CPU seconds at one thread, the sides taking turns"

    def seconds(self, sides: Mapping[str, Call]) -> dict[str, float]:
        """Return the median time of a call of each side."""
        round_of = {name: _timed(call) for name, call in sides.items()}  # a first one, to warm up
        rounds = min(max(int(self._budget / max(sum(round_of.values()), 1e-9)), 5), 51)
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, call in sides.items():
                taken[name].append(_timed(call))
        return {name: statistics.median(each) for name, each in taken.items()}


Clock = GPUClock | CPUClock


def _timed(call: Call) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def ceilings(clock: Clock, device: str, dtype: torch.dtype) -> Ceilings:
    """Measure them, the product in the dtype of activations."""
    numbers, side = (1 << 28, 8192) if device == "cuda" else (1 << 25, 1536)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    took = clock.seconds({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return Ceilings(2 * 4 * numbers / took["copy"], 2.0 * side**3 / took["product"])

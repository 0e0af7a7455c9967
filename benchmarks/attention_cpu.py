"""Which product should causal attention take on this CPU? The figures behind kernels/causal_attention.py.

    python benchmarks/attention_cpu.py

Forward and backward of one layer of the 19.5M shape (4 heads, keys of 48, values of 32), CPU milliseconds at one
thread, the sides in turn; medians with the smallest and largest, and the ratio of each to the product in blocks.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tangram.kernels.causal_attention import _Blocked

HEADS, KEY, VALUE, SCALE = 4, 48, 32, 48**-0.5


def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The product in blocks."""
    return _Blocked.apply(q, k, v, SCALE)


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The library's kernel, values padded to the width of the keys."""
    wide = F.pad(v, (0, KEY - VALUE))
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, wide)), is_causal=True, scale=SCALE)
    return out.transpose(1, 2)[..., :VALUE]


def as_is(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The library's kernel as one would call it; it falls back to its slow path without a word."""
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, scale=SCALE)
    return out.transpose(1, 2)


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "blocked": blocked,
    "sdpa, padded": padded,
    "sdpa": as_is,
}


def measure(batch: int, length: int, rounds: int) -> dict[str, list[float]]:
    """Return CPU milliseconds of each side, run in turn."""
    q, k = (torch.randn(batch, length, HEADS, KEY, requires_grad=True) for _ in range(2))
    v = torch.randn(batch, length, HEADS, VALUE, requires_grad=True)
    grad = torch.randn(batch, length, HEADS, VALUE)
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for i in range(rounds + 1):
        for name, side in SIDES.items():
            began = time.process_time()
            side(q, k, v).backward(grad)
            if i:
                times[name].append(1000 * (time.process_time() - began))
    return times


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"float32, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    for batch, length, rounds in ((4, 256, 9), (4, 512, 9), (2, 1024, 7), (1, 2048, 7)):
        times = measure(batch, length, rounds)
        base = statistics.median(times["blocked"])
        for name, values in times.items():
            middle = statistics.median(values)
            spread = f"{min(values):.1f} to {max(values):.1f}"
            print(f"{batch} x {length:5}  {name:13} {middle:8.1f} ms ({spread})  {middle / base:5.2f}")


if __name__ == "__main__":
    main()

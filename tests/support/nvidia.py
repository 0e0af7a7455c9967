"""Compiles the kernels for an NVIDIA GPU that is not there: `python tests/support/nvidia.py CAPABILITY [--all]`.

Every operation is called on tensors of the CPU as it would be on those of a GPU. What it would launch is compiled by
Triton and by NVIDIA's assembler, which come with the package triton, and is not run: what the operations return says
nothing. Prints a line of JSON for each kernel: what it needs of a core, and whether it multiplies in tensor cores.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

with mock.patch("torch.cuda.is_available", return_value=True):  # or the kernels' Triton is a placeholder
    from tangram import kernels
    from tangram.kernels import Quantized, backend

CAPABILITY = int(sys.argv[1])
HAS_FP8 = CAPABILITY >= 89
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
TENSOR_CORES = ("wgmma", "tcgen05", "mma.sync")
ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Absent:
    """The driver of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def inputs(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


def backward(y: torch.Tensor) -> None:
    y.sum().backward()


def norm(dim: int, dtype: torch.dtype) -> None:
    backward(kernels.rmsnorm(*inputs(torch.zeros(8, dim, dtype=dtype), torch.ones(dim, dtype=dtype)), 1e-6))


def gated(width: int, dtype: torch.dtype) -> None:
    backward(kernels.swiglu(*inputs(torch.zeros(8, 2 * width, dtype=dtype))))


def turned(heads: int, dim: int, dtype: torch.dtype, interleaved: bool) -> None:
    positions = torch.arange(4).expand(2, 4)
    cos, sin = kernels.rotation(positions, kernels.frequencies(dim, 1e4), dtype)
    backward(kernels.rotate(*inputs(torch.zeros(2, 4, heads, dim, dtype=dtype)), cos, sin, interleaved))


def sent(dim: int, top_k: int, dtype: torch.dtype, gaps: bool) -> None:
    ids = torch.arange(16 * top_k).view(16, top_k) % 32
    if gaps:
        ids[:, -1] = -1
    order = kernels.order_by_expert(ids, 32, 16 * (top_k - 1) if gaps else None)
    x, gates = inputs(torch.zeros(16, dim, dtype=dtype), torch.ones(16, top_k, dtype=torch.promote_types(dtype, F32)))
    backward(kernels.unpermute(kernels.permute(x, order), gates, order))


def multiplied(rows: int, outputs: int, width: int, experts: int, dtype: torch.dtype) -> None:
    both = inputs(torch.zeros(rows, width, dtype=dtype), torch.zeros(experts, outputs, width, dtype=dtype))
    backward(kernels.grouped_matmul(*both, torch.full((experts,), rows // experts)))


def attended(heads: int, kv_rank: int, rope: int, dtype: torch.dtype, tokens: int) -> None:
    q, blocks = torch.zeros(2, tokens, heads, kv_rank + rope, dtype=dtype), torch.zeros(8, 64, kv_rank + rope)
    table, lengths = torch.zeros(2, 4, dtype=torch.int32), torch.tensor([100, 200])
    kernels.mla_decode(q, blocks.to(dtype), table, lengths, 0.1, kv_rank)


def predicted(vocab_size: int, dim: int, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(8, dim, dtype=dtype), torch.zeros(vocab_size, dim, dtype=dtype)
    kernels.linear_cross_entropy(x, weight, torch.zeros(8, dtype=torch.int64), 1.0, gradients=True)


def stepped(moments: torch.dtype, stochastic: bool) -> None:
    weight, grad, first, second = (torch.zeros(64, 64, dtype=dtype) for dtype in (F32, F32, moments, moments))
    drawn = torch.Generator() if stochastic else None
    numbers = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    kernels.adamw_step([weight], [grad], [first], [second], **numbers, stochastic=drawn)


def quantized(dim: int, power_of_two: bool) -> None:
    kernels.swiglu_quantized(torch.zeros(8, 2 * dim, dtype=BF16), power_of_two)
    for transposed in (False, True):
        kernels.quantize_tiles(torch.zeros(256, dim, dtype=BF16), 128, power_of_two, transposed)
    for shape, dtype in (((256, dim), F32), ((2, 256, dim), BF16)):
        kernels.quantize_blocks(torch.zeros(shape, dtype=dtype), 128, power_of_two)


def codes(*shape: int, blocks: bool = False) -> Quantized:
    """Return codes with a scale for each 1 x 128, or for each block of 128 x 128."""
    *matrices, rows, columns = shape
    scales = torch.ones(*matrices, -(-rows // 128) if blocks else rows, -(-columns // 128))
    return Quantized(torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn), scales)


def multiplied_in_fp8(rows: int, outputs: int, width: int, dtype: torch.dtype) -> None:
    for blocks in (False, True):
        kernels.fp8_matmul(codes(rows, width), codes(outputs, width, blocks=blocks), dtype)


def multiplied_by_expert_in_fp8(rows: int, outputs: int, width: int, experts: int, dtype: torch.dtype) -> None:
    counts = torch.full((experts,), rows // experts)
    kernels.fp8_grouped_matmul(codes(rows, width), codes(experts, outputs, width, blocks=True), counts, dtype)
    kernels.fp8_grouped_weight_grad(codes(outputs, rows), codes(width, rows), counts, dtype)


def cases(whole: bool) -> Iterator[Callable[[], None]]:
    """Yield calls at DeepSeek-V3's shapes in bfloat16 and FP8; of the whole, in other shapes and dtypes too."""
    for dtype in (BF16, F32, F64) if whole else (BF16,):
        for dim in (7168, 1536, 512, 256) if whole else (7168,):
            yield partial(norm, dim, dtype)
        for width in (18432, 2048, 96) if whole else (2048,):
            yield partial(gated, width, dtype)
        for heads, dim in ((128, 64), (8, 16)) if whole else ((128, 64),):
            for interleaved in (False, True) if whole else (True,):
                yield partial(turned, heads, dim, dtype, interleaved)
        for dim, top_k in ((7168, 8), (256, 6)) if whole else ((7168, 8),):
            for gaps in (False, True):
                yield partial(sent, dim, top_k, dtype, gaps)
        for shape in ((256, 512, 768, 4), (64, 96, 128, 8), (96, 36, 20, 3)) if whole else ((256, 512, 768, 4),):
            if dtype is not F64:  # which the kernel refuses
                yield partial(multiplied, *shape, dtype)
        for tokens in (1, 2) if whole else (1,):
            if dtype is not F64 or CAPABILITY > 80:  # 64 more KiB than a core of Ampere has
                yield partial(attended, 128, 512, 64, dtype, tokens)
            if whole:
                yield partial(attended, 8, 64, 16, dtype, tokens)
        for vocab_size, dim in ((129280, 128), (4096, 256)) if whole else ((129280, 128),):
            yield partial(predicted, vocab_size, dim, dtype)
    for moments, stochastic in ((F32, False), (BF16, False), (BF16, True)):
        yield partial(stepped, moments, stochastic)
    if not HAS_FP8:
        return
    for dim in (2048, 200) if whole else (2048,):
        for power_of_two in (False, True) if whole else (True,):
            yield partial(quantized, dim, power_of_two)
    for dtype in (BF16, F32) if whole else (BF16,):
        for shape in ((256, 512, 7168), (100, 60, 200)) if whole else ((256, 512, 7168),):
            yield partial(multiplied_in_fp8, *shape, dtype)
        yield partial(multiplied_by_expert_in_fp8, 1024, 512, 768, 4, dtype)


def needs(cubin: bytes) -> dict[str, int]:
    """Return the registers of a thread, and the bytes of its stack, of an assembled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [ASSEMBLER, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", told))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def main() -> None:
    driver.set_active(Absent())
    run, seen = JITFunction.run, set[str]()

    def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        made = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        if made.hash not in seen:
            seen.add(made.hash)
            cores = [name for name in TENSOR_CORES if name in made.asm["ptx"]]
            told = {"kernel": kernel.fn.__name__, "shared": made.metadata.shared, "warps": made.metadata.num_warps}
            print(json.dumps(told | needs(made.asm["cubin"]) | {"tensor_cores": cores}), flush=True)

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(backend, "_hindrance", return_value=None),
        kernels.use("triton"),
    ):
        for case in cases("--all" in sys.argv):
            case()


if __name__ == "__main__":
    main()

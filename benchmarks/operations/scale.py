"""The shapes that are measured: DeepSeek-V3's on a GPU, smaller ones of the same kind on a CPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tangram.kernels import native_bfloat16

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Scale:
    """Sizes of what the operations are given.

    Attributes:
        device: Where it lies.
        dtype: Of activations and weights.
        rows: Rows of a linear's input, and tokens that are sent to experts.
        linears: Outputs and inputs of the linears.
        experts: Experts of a grouped product.
        expert_rows: Rows of each.
        expert_linears: Outputs and inputs of an expert's linears.
        tokens: Tokens of what goes through memory once.
        dim: Width of the residual stream.
        hidden: Width inside an expert.
        heads: Heads whose queries are turned.
        rope_dim: Width that is turned.
        routed: Experts that a router chooses from.
        top_k: Experts that it chooses.
        vocabulary: Rows of the head.
        matrix: Shape of the weight that the optimizer steps.
        decode_heads: Heads of one new token, each number a case.
        sequences: Sequences that are decoded together.
        context: Entries in the cache of each.
        latent: Width of the latent in an entry.
    """

    device: str
    dtype: torch.dtype
    rows: int
    linears: Pairs
    experts: int
    expert_rows: int
    expert_linears: Pairs
    tokens: int
    dim: int
    hidden: int
    heads: int
    rope_dim: int
    routed: int
    top_k: int
    vocabulary: int
    matrix: tuple[int, int]
    decode_heads: tuple[int, ...]
    sequences: int
    context: int
    latent: int

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return fresh normal numbers, in the dtype of activations if none is named."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)


V3 = Scale(
    device="cuda",
    dtype=torch.bfloat16,
    rows=4096,
    linears=((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)),
    experts=8,
    expert_rows=4096,
    expert_linears=((4096, 7168), (7168, 2048)),
    tokens=16384,
    dim=7168,
    hidden=2048,
    heads=128,
    rope_dim=64,
    routed=256,
    top_k=8,
    vocabulary=129280,
    matrix=(18432, 7168),
    decode_heads=(16, 32, 128),
    sequences=64,
    context=4096,
    latent=512,
)
"""The linears are DeepGEMM's: latents, queries, keys and values, attention's output, an expert's two."""

SMALL = Scale(
    device="cpu",
    dtype=torch.bfloat16 if native_bfloat16() else torch.float32,
    rows=256,
    linears=((528, 1792), (6144, 384), (1792, 512)),
    experts=8,
    expert_rows=128,
    expert_linears=((512, 896),),
    tokens=2048,
    dim=1792,
    hidden=512,
    heads=16,
    rope_dim=64,
    routed=32,
    top_k=4,
    vocabulary=4096,
    matrix=(2304, 1792),
    decode_heads=(4, 16),
    sequences=4,
    context=1024,
    latent=512,
)
"""Half of V3's linears at a quarter of their widths, and an expert's first at an eighth."""

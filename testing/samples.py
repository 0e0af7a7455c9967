"""Small surroundings for a component, and tensors to put through it."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from tangram.core.autograd import Recompute
from tangram.core.context import Context
from tangram.core.contracts import Shared
from tangram.core.layers import FullPrecision, OutputHead, TokenEmbedding, norm
from tangram.core.records import IGNORE, Batch
from tangram.testing.placing import placed

_M = TypeVar("_M", bound=nn.Module)


def context(dim: int, *, compute: torch.dtype = torch.float64, recompute: str = "none", eps: float = 1e-6) -> Context:
    """Return the surroundings of a component in a model of width `dim`, with visible initial weights."""
    precision = FullPrecision(compute)
    return Context(dim=dim, init_std=0.3, norm_eps=eps, precision=precision, recompute=Recompute(recompute))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal values of a shape; the same numbers, rounded, in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(module: _M, seed: int, std: float = 0.3) -> _M:
    """Fill every parameter; norms lie around 1, so that a forgotten one is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + noise if name.endswith("norm.weight") or name == "weight" else noise)
    return module


def documents(segments: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return positions, which start anew with each document, and segments, both [B, S]."""
    numbers = torch.tensor(segments)
    columns = torch.arange(numbers.shape[1]).expand_as(numbers)
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[:, 1:] = numbers.diff(dim=1) != 0
    return columns - torch.where(first, columns, 0).cummax(1).values, numbers


def packed(segments: Sequence[Sequence[int]], vocab_size: int, seed: int) -> Batch:
    """Return isolated documents that predict nothing across a boundary."""
    positions, numbers = documents(segments)
    generator = torch.Generator().manual_seed(seed)
    window = torch.randint(vocab_size, (len(numbers), numbers.shape[1] + 1), generator=generator)
    targets = window[:, 1:].clone()
    targets[:, :-1][numbers.diff(dim=1) != 0] = IGNORE
    return Batch(window[:, :-1], targets, positions, numbers, int((targets != IGNORE).sum()), len(numbers))


class Trunk:
    """What token objectives borrow, filled; and its parameters by name."""

    def __init__(self, ctx: Context, vocab_size: int, seed: int, device: str = "cpu") -> None:
        self.embedding = placed(filled(TokenEmbedding(ctx, vocab_size), seed), device)
        self.norm = placed(filled(norm(ctx, ctx.dim), seed + 1), device)
        self.head = placed(filled(OutputHead(ctx, vocab_size), seed + 2), device)
        self.shared = Shared(self.embedding, self.norm, self.head)

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters of the three."""
        return {"embedding": self.embedding.weight, "norm": self.norm.weight, "head": self.head.weight}

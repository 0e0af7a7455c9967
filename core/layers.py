"""The layers that the trunk and the components share: norm, linears, embedding and head."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tangram.core.autograd import grouped_linear, head_loss, linear
from tangram.core.contracts import Embedding, Head, Input
from tangram.kernels import rmsnorm

if TYPE_CHECKING:
    from tangram.core.context import Context


def normal_(weight: Tensor, std: float) -> None:
    """Draw a weight from a normal distribution; one without memory, at whose sight torch imports its compiler, not."""
    if weight.device.type != "meta":
        nn.init.normal_(weight, std=std)


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension; statistics in float32 or better."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed x [..., D] in its dtype."""
        return rmsnorm(x, self.weight, self.eps)

    if TYPE_CHECKING:
        __call__ = forward


def norm(ctx: "Context", dim: int) -> RMSNorm:
    """Return an RMSNorm over `dim` values as the context wants it."""
    return RMSNorm(dim, ctx.norm_eps, ctx.precision.master)


class Linear(nn.Module):
    """A linear without bias, computed in the dtype of its input; its weight gradient can wait."""

    def __init__(self, ctx: "Context", d_in: int, d_out: int) -> None:
        super().__init__()
        self.init_std, self.weight_grads = ctx.init_std, ctx.parallel.weight_grads
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=ctx.precision.master))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution."""
        normal_(self.weight, self.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., I] @ weight [O, I] transposed."""
        return linear(x, self.weight, self.weight_grads)

    if TYPE_CHECKING:
        __call__ = forward


class GroupedLinear(nn.Module):
    """One linear for each expert, computed in the dtype of its input; its weight gradient can wait."""

    axis = "expert"
    """The first dimension of the weight counts experts: this rank holds its share of all `n`."""

    def __init__(self, ctx: "Context", n: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.init_std, self.weight_grads = ctx.init_std, ctx.parallel.weight_grads
        self.experts = ctx.parallel.layout.share(n)
        self.weight = nn.Parameter(torch.empty(len(self.experts), d_out, d_in, dtype=ctx.precision.master))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's weight from its own stream, so that a slice does not depend on who holds the rest."""
        if self.weight.device.type == "meta":
            return
        seed = int(torch.randint(2**62, ()))  # drawn, so that two modules built in a row differ
        with torch.no_grad():
            for expert, weight in zip(self.experts, self.weight, strict=True):
                stream = torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * expert) % 2**63)
                weight.normal_(std=self.init_std, generator=stream)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return rows [M, I], sorted by expert, times their expert's weight [O, I] transposed; counts is int64 [E]."""
        return grouped_linear(rows, self.weight, counts, self.weight_grads)

    if TYPE_CHECKING:
        __call__ = forward


class FullPrecision:
    """Every product in the compute dtype; parameters in float32, or float64 where that computes."""

    rounding = 0.0

    def __init__(self, compute: torch.dtype = torch.float32) -> None:
        self.compute = compute
        self.master = torch.promote_types(compute, torch.float32)

    def linear(self, ctx: "Context", d_in: int, d_out: int, *, input: Input = "plain") -> nn.Module:
        """Return a `Linear`, whatever its input."""
        return Linear(ctx, d_in, d_out)

    def grouped_linear(self, ctx: "Context", n: int, d_in: int, d_out: int, *, input: Input = "plain") -> nn.Module:
        """Return a `GroupedLinear`, whatever its input."""
        return GroupedLinear(ctx, n, d_in, d_out)


class TokenEmbedding(Embedding):
    """Token embedding; its gradient stays with autograd."""

    def __init__(self, ctx: "Context", vocab_size: int) -> None:
        super().__init__()
        self.init_std, self.compute = ctx.init_std, ctx.precision.compute
        self.weight = nn.Parameter(torch.empty(vocab_size, ctx.dim, dtype=ctx.precision.master))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution."""
        normal_(self.weight, self.init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [B, S, D] of tokens int64 [B, S] in the compute dtype."""
        return nn.functional.embedding(tokens, self.weight).to(self.compute)


class OutputHead(Head):
    """Output projection; its loss never holds the logits of a whole batch."""

    def __init__(self, ctx: "Context", vocab_size: int) -> None:
        super().__init__()
        self.init_std, self.weight_grads = ctx.init_std, ctx.parallel.weight_grads
        self.weight = nn.Parameter(torch.empty(vocab_size, ctx.dim, dtype=ctx.precision.master))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution."""
        normal_(self.weight, self.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [..., V] of x [..., D], at least float32."""
        logits = linear(x, self.weight, self.weight_grads)
        return logits.to(torch.promote_types(x.dtype, torch.float32))

    def loss(self, x: Tensor, targets: Tensor, n_targets: int) -> Tensor:
        """Return the summed cross entropy of x [B, S, D] against targets [B, S], over `n_targets`."""
        return head_loss(x.flatten(0, -2), self.weight, targets.flatten(), 1.0 / n_targets, self.weight_grads)

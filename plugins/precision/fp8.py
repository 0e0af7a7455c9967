"""Products in FP8 with fine-grained scales (arXiv:2412.19437, section 3.3)."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from attrs import evolve, field, frozen
from attrs.validators import in_
from torch import Tensor, nn

from tangram.core.autograd import Recompute, WeightGrads
from tangram.core.context import Context
from tangram.core.contracts import Input, Precision
from tangram.core.layers import GroupedLinear, Linear
from tangram.core.registry import component
from tangram.kernels import Scaling
from tangram.kernels.compiled import compiler
from tangram.plugins.precision.fp8_products import Products

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_FORMATS = {
    "e4m3": (torch.float8_e4m3fn, torch.float8_e4m3fn),
    "e5m2": (torch.float8_e5m2, torch.float8_e5m2),
    "hybrid": (torch.float8_e4m3fn, torch.float8_e5m2),
}
"""Of inputs and weights, and of gradients."""

_SCOPES = ("tile", "block", "row", "tensor")


@component("precision", use="fp8")
@frozen(kw_only=True)
class FP8Config:
    """Multiply in FP8: the products of attention projections and feed-forwards, forward and backward.

    Embedding, head, router, norms, attention's own products and the projection of multi-token prediction stay in
    the compute dtype; parameters, their gradients and the optimizer in float32. On a CPU the operands are rounded as
    in FP8 and multiplied in the compute dtype.

    Attributes:
        compute: Dtype of activations between the products.
        format: E4M3 everywhere as in DeepSeek-V3; E5M2; or hybrid, E5M2 for gradients alone.
        granularity: What shares a scale in an input: a tile of 1 x 128, a block of 128 x 128, a row, or the tensor.
            A weight has a scale for blocks of 128 x 128, or with tensor for all of it.
        gradients: What shares a scale in a gradient; with block the paper's run diverged (appendix B.2).
        accumulation: Sums promoted to float32 every 128 products, or limited to a tensor core's 14 bits (slow).
        attention_cache: How the input of attention's output projection is kept for backward: in E4M3, or in the
            twelve bits of E5M6.
    """

    compute: Literal["bfloat16", "float32"] = field(default="bfloat16", validator=in_(tuple(_DTYPES)))
    format: Literal["e4m3", "e5m2", "hybrid"] = field(default="e4m3", validator=in_(tuple(_FORMATS)))
    granularity: Literal["tile", "block", "row", "tensor"] = field(default="tile", validator=in_(_SCOPES))
    gradients: Literal["tile", "block", "row", "tensor"] = field(default="tile", validator=in_(_SCOPES))
    accumulation: Literal["promoted", "limited"] = field(default="promoted", validator=in_(("promoted", "limited")))
    attention_cache: Literal["e4m3", "e5m6"] = field(default="e4m3", validator=in_(("e4m3", "e5m6")))

    def build(self) -> Precision:
        """Build it."""
        if compiler() is None and not torch.cuda.is_available():
            warnings.warn(
                "precision fp8 found no C++ compiler (g++, or what CXX names): it rounds in plain torch, at several "
                "times the cost (docs/fp8.md has the figures)",
                stacklevel=2,
            )
        return FP8(self)


class FP8:
    """Makes linears whose three products are in FP8."""

    def __init__(self, config: FP8Config) -> None:
        self.compute = _DTYPES[config.compute]
        self.master = torch.float32
        forward, backward = _FORMATS[config.format]
        unit = max(torch.finfo(format).eps for format in (forward, backward)) / 2
        self.rounding = (1 + unit) ** 2 - 1  # what was kept of an input is rounded again, in tiles across
        self._products = Products(
            input=Scaling(forward, config.granularity),
            weight=Scaling(forward, "tensor" if config.granularity == "tensor" else "block"),
            gradient=Scaling(backward, config.gradients),
            limited=config.accumulation == "limited",
            wide_cache=False,
        )
        self._wide_attention_cache = config.attention_cache == "e5m6"

    def linear(self, ctx: Context, d_in: int, d_out: int, *, input: Input = "plain") -> nn.Module:
        """Return an `FP8Linear`."""
        return FP8Linear(ctx, d_in, d_out, self._for(input))

    def grouped_linear(self, ctx: Context, n: int, d_in: int, d_out: int, *, input: Input = "plain") -> nn.Module:
        """Return an `FP8GroupedLinear`."""
        products = self._for(input)
        if input != "dispatched":  # its output goes home, so its gradient is what is dispatched
            products = evolve(products, gradient=products.gradient._replace(power_of_two=True))
        return FP8GroupedLinear(ctx, n, d_in, d_out, products)

    def _for(self, input: Input) -> Products:
        """Return the products with scales that are powers of two where the paper has them."""
        if input == "plain":
            return self._products
        scaling = self._products.input._replace(power_of_two=True)
        return evolve(self._products, input=scaling, wide_cache=input == "attention" and self._wide_attention_cache)


class _Product(torch.autograd.Function):
    # The Parameter stays on ctx and out of saved_tensors, as in core: hooks on those would lose its identity.
    @staticmethod
    def forward(ctx, x, weight, counts, products, weight_grads, recompute):  # type: ignore[no-untyped-def]
        flat = x.flatten(0, -2)
        rounded = products.quantize(flat)
        ctx.weight, ctx.counts, ctx.products, ctx.weight_grads = weight, counts, products, weight_grads
        ctx.shape, ctx.dtype, ctx.whole = x.shape, x.dtype, recompute.remembers(x)
        # What can be computed again costs nothing to keep; anything else is kept as the codes that were multiplied.
        ctx.save_for_backward(*([x] if ctx.whole else products.kept(flat, rounded)))
        y = products.forward(rounded, weight, counts, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        weight, counts, products = ctx.weight, ctx.counts, ctx.products
        flat, width = grad.flatten(0, -2).contiguous(), ctx.shape[-1]
        kept = ctx.saved_tensors
        if ctx.whole:
            x = kept[0].flatten(0, -2)
            kept = products.kept(x, products.quantize(x))
        x_grad = given = None
        if ctx.needs_input_grad[0]:
            x_grad = products.input_grad(flat, weight, counts).view(ctx.shape)

        def weight_grad() -> Tensor:
            x = products.restored(kept, width, ctx.dtype)
            grad: Tensor = products.weight_grad(flat, x, counts).to(weight.dtype)
            return grad

        if ctx.needs_input_grad[1]:
            given = ctx.weight_grads.give(weight, weight_grad)
        return x_grad, given, None, None, None, None


class FP8Linear(Linear):
    """A linear without bias whose products are in FP8; its weight gradient can wait."""

    def __init__(self, ctx: Context, d_in: int, d_out: int, products: Products) -> None:
        super().__init__(ctx, d_in, d_out)
        self.products, self.recompute, self.layer = products, ctx.recompute, ctx.layer

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., I] @ weight [O, I] transposed."""
        return _multiply(x, self.weight, None, self.products, self.weight_grads, self.recompute)

    if TYPE_CHECKING:
        __call__ = forward

    def measures(self, x: Tensor) -> Mapping[str, float]:
        """Return how well FP8 holds the input x [..., I] and what comes of it."""
        return self.products.measures(x.flatten(0, -2), self.weight, None)


class FP8GroupedLinear(GroupedLinear):
    """One linear for each expert whose products are in FP8; their weight gradients can wait."""

    def __init__(self, ctx: Context, n: int, d_in: int, d_out: int, products: Products) -> None:
        super().__init__(ctx, n, d_in, d_out)
        self.products, self.recompute, self.layer = products, ctx.recompute, ctx.layer

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return rows [M, I], sorted by expert, times their expert's weight [O, I] transposed; counts is int64 [E]."""
        return _multiply(rows, self.weight, counts, self.products, self.weight_grads, self.recompute)

    if TYPE_CHECKING:
        __call__ = forward

    def measures(self, rows: Tensor, counts: Tensor) -> Mapping[str, float]:
        """Return how well FP8 holds the rows [M, I] and what comes of them."""
        return self.products.measures(rows, self.weight, counts)


def _multiply(
    x: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    products: Products,
    weight_grads: WeightGrads,
    recompute: Recompute,
) -> Tensor:
    out: Tensor = _Product.apply(x, weight, counts, products, weight_grads, recompute)
    return out

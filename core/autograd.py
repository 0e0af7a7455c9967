"""What the pieces need from autograd: weight gradients that can wait, and values that can be computed again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tangram.kernels import (
    grouped_matmul_forward,
    grouped_matmul_input_grad,
    grouped_matmul_weight_grad,
    linear_cross_entropy,
    place_of,
    product,
    product_transposed,
)

_T = TypeVar("_T")


class WeightGrads:
    """A rank's queue of weight gradients: run at once, unless a backward is told to defer them.

    A pipeline that splits backward in two runs the input gradients first and these closures later.
    """

    def __init__(self) -> None:
        self._pending: list[Callable[[], None]] | None = None

    @contextmanager
    def deferred(self) -> Iterator[list[Callable[[], None]]]:
        """Collect the weight gradients of the backward inside; calling each adds it to its parameter."""
        if self._pending is not None:
            raise RuntimeError("weight gradients are deferred already: one backward runs at a time")
        self._pending = []
        try:
            yield self._pending
        finally:
            self._pending = None

    def give(self, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
        """Return the gradient for autograd to add, or queue it and return None."""
        if self._pending is None:
            return compute()

        @torch.no_grad()  # as inside a backward: what was saved has a graph of its own
        def add() -> None:
            grad = compute()
            weight.grad = grad if weight.grad is None else weight.grad.add_(grad)

        self._pending.append(add)
        return None


class _Linear(torch.autograd.Function):
    # The Parameter stays on ctx and out of saved_tensors: hooks on those would lose its identity.
    @staticmethod
    def forward(ctx, x, weight, weight_grads):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.weight, ctx.weight_grads = weight, weight_grads
        return product_transposed(x, weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        x_grad = product(grad, weight.to(grad.dtype)) if ctx.needs_input_grad[0] else None

        def weight_grad() -> Tensor:
            return product(grad.flatten(0, -2).t(), x.flatten(0, -2)).to(weight.dtype)

        return x_grad, ctx.weight_grads.give(weight, weight_grad) if ctx.needs_input_grad[1] else None, None


def linear(x: Tensor, weight: Tensor, weight_grads: WeightGrads) -> Tensor:
    """Return x [..., I] times weight [O, I] transposed, in the dtype of x."""
    if not torch.is_grad_enabled():  # of a few tokens, going through autograd takes longer than the product
        return product_transposed(x, weight)
    out: Tensor = _Linear.apply(x, weight, weight_grads)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, counts, weight_grads):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, counts)
        ctx.weight, ctx.weight_grads = weight, weight_grads
        return grouped_matmul_forward(rows, weight.to(rows.dtype), counts)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, counts = ctx.saved_tensors
        weight = ctx.weight
        grad = grad.contiguous()
        rows_grad = grouped_matmul_input_grad(grad, weight.to(grad.dtype), counts) if ctx.needs_input_grad[0] else None

        def weight_grad() -> Tensor:
            return grouped_matmul_weight_grad(grad, rows, counts).to(weight.dtype)

        given = ctx.weight_grads.give(weight, weight_grad) if ctx.needs_input_grad[1] else None
        return rows_grad, given, None, None


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor, weight_grads: WeightGrads) -> Tensor:
    """Return rows [M, I], sorted by expert, times their expert's weight [E, O, I] transposed."""
    if not torch.is_grad_enabled():
        return grouped_matmul_forward(rows, weight.to(rows.dtype), counts)
    out: Tensor = _GroupedLinear.apply(rows, weight, counts, weight_grads)
    return out


class _HeadLoss(torch.autograd.Function):
    # Both gradients are made in the forward, chunk by chunk: the logits are never kept.
    @staticmethod
    def forward(ctx, x, weight, targets, scale, weight_grads, gradients):  # type: ignore[no-untyped-def]
        out = linear_cross_entropy(x, weight.to(x.dtype), targets, scale, gradients=gradients)
        if gradients:
            ctx.save_for_backward(out.x_grad, out.weight_grad)
        ctx.weight, ctx.weight_grads = weight, weight_grads
        return out.loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x_grad, w_grad = ctx.saved_tensors
        weight = ctx.weight
        given = ctx.weight_grads.give(weight, lambda: (grad * w_grad).to(weight.dtype))
        return (grad * x_grad).to(x_grad.dtype), given, None, None, None, None


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, scale: float, weight_grads: WeightGrads) -> Tensor:
    """Return `scale` times the summed cross entropy of x [N, D] @ weight [V, D] transposed against targets [N]."""
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    out: Tensor = _HeadLoss.apply(x, weight, targets, scale, weight_grads, gradients)
    return out


class _Recipe:
    """How to make a tensor again: fn and its arguments, a `_Use` where one can be made again itself."""

    def __init__(self, fn: Callable[..., Tensor], args: list[object]) -> None:
        self.fn, self.args = fn, args
        self.takers = 0  # uses that were packed and not unpacked yet
        self.made: Tensor | None = None

    def make(self) -> Tensor:
        if self.made is not None:
            return self.made
        with torch.no_grad():
            made = self.fn(*(arg.of(arg.recipe.make()) if isinstance(arg, _Use) else arg for arg in self.args))
        if self.takers > 0:
            self.made = made
        return made

    def take(self) -> Tensor:
        made = self.make()
        self.takers -= 1
        if self.takers <= 0:
            self.made = None
        return made


class _Use(NamedTuple):
    """What is kept in the place of a tensor: the recipe for its storage, and the view of it."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, made: Tensor) -> Tensor:
        """Return the view of what the recipe made."""
        return made.as_strided(self.size, self.stride, self.offset)


class _EnoughError(Exception):
    """A run has saved again all that the first one saved: what is left of it is not needed."""


class _Again:
    """What a run of many operations saves for backward, none of it kept: the first use runs it again.

    As `torch.utils.checkpoint` does it, which imports torch's compiler: seconds of a process that compiles nothing.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self._shapes: list[torch.Size] = []
        self._made: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> int:
        self._shapes.append(tensor.shape)
        return len(self._shapes) - 1

    def unpack(self, number: int) -> Tensor:
        if number not in self._made:
            self._make()
        return self._made.pop(number)

    def _make(self) -> None:
        made: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            made.append(tensor.detach())
            if len(made) == len(self._shapes):
                raise _EnoughError
            return made[-1]

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with suppress(_EnoughError), torch.enable_grad(), hooks:
            self._run()
        if [tensor.shape for tensor in made] != self._shapes:
            raise RuntimeError("run again in backward, operations save other tensors than at first")
        self._made = dict(enumerate(made))


class Recompute:
    """What is computed again in backward instead of being kept; gradients are bitwise those of plain autograd.

    Inside a scope, `y = recompute(fn, *args)` runs fn and remembers how y was made; whenever any operation saves
    y or a view of it for backward, this recipe is saved instead, and fn runs again when backward asks. What
    operations inside fn save for themselves is kept: a fn that is worth a recipe saves its arguments only. fn must
    not return one of them, and y must not be written in place.

    `recompute.whole(fn, *args)` is for a fn of many operations, of which the policy `full` keeps the arguments alone.

    Either fn must be a pure function of its arguments. Outside a scope, or when the policy is off, it just runs.
    """

    def __init__(self, policy: str = "none") -> None:
        self.policy = policy
        self._recipes: dict[int, tuple[Tensor, _Recipe]] | None = None

    def __call__(self, fn: Callable[..., Tensor], *args: object) -> Tensor:
        """Return fn(*args), which may be computed again in backward."""
        if self._recipes is None or not torch.is_grad_enabled():
            return fn(*args)
        y = fn(*args)
        recipe = _Recipe(fn, [self._use(arg) if isinstance(arg, Tensor) else arg for arg in args])
        # y is held until the scope ends, or another storage could take the place of its own.
        self._recipes[place_of(y)] = (y, recipe)
        return y

    def whole(self, fn: Callable[..., _T], *args: object) -> _T:
        """Return fn(*args); all that its backward needs may be computed again from the arguments, fn run as a whole."""
        if self.policy != "full" or self._recipes is None or not torch.is_grad_enabled():
            return fn(*args)

        def alone(*args: object) -> _T:
            # Backward runs fn outside any scope, where there are no recipes: so there are none now either.
            recipes, self._recipes = self._recipes, None
            try:
                return fn(*args)
            finally:
                self._recipes = recipes

        needs = [isinstance(arg, Tensor) and arg.requires_grad for arg in args]
        kept = [self._pack(arg) if isinstance(arg, Tensor) else arg for arg in args]

        def from_kept() -> _T:
            given = zip(kept, needs, strict=True)
            return alone(*(_leaf(self._unpack(a), need) if isinstance(a, Tensor | _Use) else a for a, need in given))

        again = _Again(from_kept)
        with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
            return alone(*args)

    def remembers(self, tensor: Tensor) -> bool:
        """Return whether saving the tensor for backward would keep a recipe in its place."""
        return self._recipes is not None and isinstance(self._use(tensor), _Use)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Replace what is saved inside by recipes; one scope is one phase."""
        if self.policy == "none" or not torch.is_grad_enabled():
            yield
            return
        if self._recipes is not None:
            raise RuntimeError("a recompute scope is open already: a scope is one phase")
        self._recipes = {}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._recipes = None

    def _use(self, tensor: Tensor) -> Tensor | _Use:
        held = None if self._recipes is None else self._recipes.get(place_of(tensor))
        if held is None or held[0].dtype != tensor.dtype:
            return tensor
        return _Use(held[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _pack(self, tensor: Tensor) -> Tensor | _Use:
        use = self._use(tensor)
        if isinstance(use, Tensor):
            return use.detach()  # an operation that saved its own output would keep its graph alive for good
        use.recipe.takers += 1
        return use

    @staticmethod
    def _unpack(packed: Tensor | _Use) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.of(packed.recipe.take())


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)

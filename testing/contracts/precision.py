"""What every precision owes: linears within the rounding it names, whose weight gradients can wait."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, get_args

import torch
from attrs import frozen
from hypothesis import strategies as st
from torch import Tensor, nn

from tangram.core.autograd import Recompute
from tangram.core.context import Context
from tangram.core.contracts import Input, Precision
from tangram.core.model import initialize
from tangram.testing.laws import Contract, law
from tangram.testing.mutants import precision as mutants
from tangram.testing.placing import placed
from tangram.testing.samples import normal
from tangram.testing.strategies import seeds
from tangram.testing.tolerance import tolerance

_SIZES = st.integers(1, 9)
_COUNTS = st.lists(st.integers(0, 3), max_size=3).map(lambda counts: [*counts, 0, 2])
"""Rows of each expert: one has none, and not all have as many."""

_SCALES = st.sampled_from((1e-3, 1.0, 1e3))
_INPUTS: st.SearchStrategy[Input] = st.sampled_from(get_args(Input))


@frozen(eq=False)
class _Made:
    """Linears with their surroundings: what a rank defers, what it computes again, and where."""

    ctx: Context
    device: str

    @property
    def precision(self) -> Precision:
        return self.ctx.precision

    def linear(self, d_in: int, d_out: int, input: Input = "plain") -> nn.Module:
        return placed(self.ctx.linear(d_in, d_out, input=input), self.device)

    def grouped(self, n: int, d_in: int, d_out: int, input: Input = "plain") -> nn.Module:
        return placed(self.ctx.grouped_linear(n, d_in, d_out, input=input), self.device)

    def counts(self, counts: Sequence[int]) -> Tensor:
        """Return how many rows each expert has."""
        return torch.tensor(counts, device=self.device)

    def rows(self, shape: Sequence[int], seed: int, scale: float = 1.0) -> Tensor:
        """Return drawn values in the compute dtype, as leaves."""
        return normal(*shape, seed=seed).mul(scale).to(self.device, self.precision.compute).requires_grad_()


class PrecisionContract(Contract):
    """The laws of the slot `precision`. Its products are in its own compute dtype, whatever the contract's is."""

    slot = "precision"
    optional: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def make(cls, config: Any) -> Precision:
        """Return what the config builds."""
        made: Precision = config.build()
        return made

    def made(self, config: Any, recompute: str = "none") -> _Made:
        """Return what it builds in small surroundings."""
        ctx = Context(dim=4, init_std=0.3, precision=self.make(config), recompute=Recompute(recompute))
        return _Made(ctx, self.device)

    @law(
        d_in=_SIZES,
        d_out=_SIZES,
        rows=_SIZES,
        input=_INPUTS,
        scale=_SCALES,
        seed=seeds(),
        kills=[mutants.rounds_twice],
    )
    def a_linear_is_a_product_within_its_rounding(
        self, config: Any, d_in: int, d_out: int, rows: int, input: Input, scale: float, seed: int
    ) -> None:
        """Whatever its input, a linear and its gradients are the products, within `rounding` and that of the dtype."""
        made = self.made(config)
        linear = made.linear(d_in, d_out, input)
        weight, x = linear.get_parameter("weight"), made.rows((2, rows, d_in), seed, scale)
        assert weight.shape == (d_out, d_in), f"its parameter `weight` is {list(weight.shape)}"
        y = linear(x)
        grad = made.rows(y.shape, seed + 1).detach()
        y.backward(grad)
        assert x.grad is not None and weight.grad is not None, "a gradient is missing"
        flat_x, flat_grad = x.detach().flatten(0, 1), grad.flatten(0, 1)
        _product(y.flatten(0, 1), flat_x, weight.t(), made.precision, "the output")
        _product(x.grad.flatten(0, 1), flat_grad, weight, made.precision, "the gradient of the input")
        _product(weight.grad, flat_grad.t(), flat_x, made.precision, "the gradient of the weight")

    @law(
        counts=_COUNTS,
        d_in=_SIZES,
        d_out=_SIZES,
        input=_INPUTS,
        seed=seeds(),
        kills=[mutants.gives_an_expert_the_rows_of_the_next],
    )
    def a_grouped_linear_is_a_linear_for_each_expert(
        self, config: Any, counts: list[int], d_in: int, d_out: int, input: Input, seed: int
    ) -> None:
        """An expert multiplies its own rows; one without rows has no gradient but zero, and there may be no rows."""
        made = self.made(config)
        grouped = made.grouped(len(counts), d_in, d_out, input)
        shape = grouped.get_parameter("weight").shape
        assert shape == (len(counts), d_out, d_in), f"its parameter `weight` is {list(shape)}"
        for each in (counts, [0] * len(counts)):
            grouped.zero_grad()
            self._is_grouped(made, grouped, each, seed)

    def _is_grouped(self, made: _Made, grouped: nn.Module, counts: list[int], seed: int) -> None:
        ends, weight = [0, *torch.tensor(counts).cumsum(0).tolist()], grouped.get_parameter("weight")
        x = made.rows((ends[-1], weight.shape[2]), seed)
        y = grouped(x, made.counts(counts))
        assert y.shape == (ends[-1], weight.shape[1])
        grad = made.rows(y.shape, seed + 1).detach()
        y.backward(grad)
        assert x.grad is not None and weight.grad is not None, "a gradient is missing"
        for expert, (start, stop) in enumerate(pairwise(ends)):
            own, precision, matrix = slice(start, stop), made.precision, weight[expert]
            inside, upstream = x.detach()[own], grad[own]
            _product(y[own], inside, matrix.t(), precision, f"the output of expert {expert}")
            _product(x.grad[own], upstream, matrix, precision, f"the gradient of the rows of expert {expert}")
            _product(weight.grad[expert], upstream.t(), inside, precision, f"the gradient of expert {expert}")

    @law(rows=_SIZES, row=st.integers(0, 8), seed=seeds(), kills=[mutants.divides_by_the_largest])
    def rows_of_zeros_stay_zeros(self, config: Any, rows: int, row: int, seed: int) -> None:
        """A row of zeros comes out as zeros and leaves gradients finite, as do zeros alone, there and back."""
        made, d_in = self.made(config), 5
        for module, counts in ((made.linear(d_in, 3), []), (made.grouped(1, d_in, 3), [rows])):
            weight = module.get_parameter("weight")
            places = torch.arange(rows, device=self.device)
            for empty in (places == row % rows, places >= 0):
                module.zero_grad()
                x = made.rows((rows, d_in), seed).detach().masked_fill(empty[:, None], 0.0).requires_grad_()
                y = module(x, *([made.counts(counts)] if counts else []))
                assert not bool(y[empty].any()), "zeros come out as something else"
                y.backward(torch.ones_like(y).masked_fill(empty[:, None], 0.0))
                assert x.grad is not None and weight.grad is not None, "a gradient is missing"
                assert bool(x.grad.isfinite().all() and weight.grad.isfinite().all()), "a gradient is not finite"
                assert not bool(x.grad[empty].any()), "a gradient of zeros comes back as something else"
                assert not empty.all() or not bool(weight.grad.any()), "zeros alone move the weight"

    @law(seed=seeds(), kills=[mutants.widens_its_product, mutants.keeps_parameters_in_half])
    def dtypes_are_those_that_it_names(self, config: Any, seed: int) -> None:
        """Parameters and their gradients are of `master`, outputs and the gradients of inputs of `compute`."""
        made = self.made(config)
        for module, counts in ((made.linear(4, 3), []), (made.grouped(2, 4, 3), [made.counts([1, 2])])):
            x = made.rows((3, 4), seed)
            y = module(x, *counts)
            assert y.dtype is made.precision.compute, f"an output is {y.dtype}"
            y.sum().backward()
            assert x.grad is not None and x.grad.dtype is made.precision.compute, "a gradient of an input is not"
            for name, parameter in module.named_parameters():
                assert parameter.dtype is made.precision.master, f"{name} is {parameter.dtype}"
                assert parameter.grad is not None and parameter.grad.dtype is made.precision.master, f"{name}: gradient"

    @law(
        policy=st.sampled_from(("selective", "full")),
        counts=_COUNTS,
        seed=seeds(),
        kills=[mutants.loses_deferred_gradients, mutants.doubles_deferred_gradients, mutants.does_not_wait],
    )
    def deferred_and_recomputed_is_plain(self, config: Any, policy: str, counts: list[int], seed: int) -> None:
        """Two backwards whose weight gradients wait, their inputs or all computed again, give the plain gradients."""
        plain, later = self.made(config), self.made(config, policy)
        one, other = self._pair(plain, len(counts)), self._pair(later, len(counts))
        other.load_state_dict(one.state_dict())
        for pass_ in range(2):
            x = plain.rows((sum(counts), 4), seed + pass_)
            again = x.detach().clone().requires_grad_()
            _through(one, x, counts, Recompute()).backward()
            before = _gradients(other)
            recompute = later.ctx.recompute
            with recompute.scope():
                loss = recompute.whole(_through, other, again, counts, recompute)
            with later.ctx.parallel.weight_grads.deferred() as pending:
                loss.backward()
            assert _equal(before, _gradients(other)), "a weight gradient did not wait"
            for add in pending:
                add()
            assert x.grad is not None and again.grad is not None, "a gradient of an input is missing"
            assert torch.equal(x.grad, again.grad), "the gradient of the input differs"
        assert _equal(_gradients(one), _gradients(other)), "a weight gradient differs"

    @law(
        held=st.integers(1, 3),
        more=st.integers(1, 3),
        seed=seeds(),
        kills=[mutants.draws_all_experts_from_one_stream, mutants.forgets_that_experts_have_an_axis],
    )
    def an_expert_begins_the_same_whoever_holds_the_others(self, config: Any, held: int, more: int, seed: int) -> None:
        """A grouped linear says that its first axis counts experts, and an expert's values do not depend on others."""
        weights = []
        for n in (held, held + more):
            torch.manual_seed(seed)
            grouped = self.made(config).grouped(n, 4, 3)
            assert getattr(grouped, "axis", None) == "expert", "it does not say `axis = 'expert'`"
            weights.append(grouped.get_parameter("weight"))
        assert torch.equal(weights[0], weights[1][:held]), "an expert begins otherwise beside more of them"
        assert not torch.equal(weights[1][0], weights[1][1]), "two experts begin alike"

    @law(seed=seeds(), kills=[mutants.leaves_its_weights_as_they_were])
    def a_model_of_its_linears_is_built_without_memory_first(self, config: Any, seed: int) -> None:
        """Its linears are built on the device `meta`, and `reset_parameters` draws every weight from torch's seed."""
        states = []
        for _ in range(2):
            with torch.device("meta"):
                pair = self._pair(self.made(config), 3)
            assert all(tensor.is_meta for tensor in pair.state_dict().values()), "a tensor is on a device of its own"
            pair.to_empty(device=self.device)
            for parameter in pair.parameters():
                parameter.data.fill_(float("nan"))
            initialize(pair, seed, self.device)
            states.append(dict(pair.named_parameters()))
        for name, parameter in states[0].items():
            assert bool(parameter.isfinite().all()), f"reset_parameters leaves {name} as it was"
            assert torch.equal(parameter, states[1][name]), f"{name} is not drawn from torch's generator"

    def _pair(self, made: _Made, n: int) -> nn.ModuleDict:
        return nn.ModuleDict({"linear": made.linear(4, 4), "grouped": made.grouped(n, 4, 3)})


def _product(actual: Tensor, left: Tensor, right: Tensor, precision: Precision, what: str) -> None:
    """Assert that `actual` is left [A, I] @ right [I, B], each element within what rounding its terms may leave."""
    left, right = left.detach().double(), right.detach().double()
    error = (actual.detach().double() - left @ right).abs()
    sizes, off = (left.abs(), right.abs()), (_off(left, precision.rounding), _off(right, precision.rounding))
    of_operands = off[0] @ sizes[1] + sizes[0] @ off[1] + off[0] @ off[1]
    of_sums = tolerance(precision.compute, max(1, left.shape[1])) * ((sizes[0] + off[0]) @ (sizes[1] + off[1]))
    assert bool((error <= of_operands + of_sums).all()), f"{what} is off by {float(error.max()):.3g}, more than allowed"


def _off(operand: Tensor, rounding: float) -> Tensor:
    """Return by how much each element may be off before it is multiplied."""
    if not rounding or not operand.numel():
        return torch.zeros_like(operand)
    return rounding * operand.abs().clamp_min(2**-9 * float(operand.abs().max()))


def _through(pair: nn.ModuleDict, x: Tensor, counts: list[int], recompute: Recompute) -> Tensor:
    """Return a loss behind both linears, each fed what can be computed again."""
    hidden = pair["linear"](recompute(torch.tanh, x))
    out: Tensor = pair["grouped"](recompute(torch.tanh, hidden), torch.tensor(counts, device=x.device))
    return out.square().sum()


def _gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def _equal(one: Mapping[str, Tensor | None], other: Mapping[str, Tensor | None]) -> bool:
    pairs = [(value, other[name]) for name, value in one.items()]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

"""One dtype for every product: what it names, what it makes, and what a block then returns."""

import pytest
import torch
from builders import SMALL_BLOCK

from tangram.core.block import Block
from tangram.core.context import Context
from tangram.plugins.precision.full import FullConfig
from tangram.testing import assert_close
from tangram.testing.samples import documents, normal

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float64": (torch.float64, torch.float64),
}
EVERY = pytest.mark.parametrize(("name", "compute", "master"), [(name, *pair) for name, pair in DTYPES.items()])


@EVERY
def test_it_names_the_dtypes_of_activations_and_parameters(name, compute, master):
    precision = FullConfig(compute=name).build()
    assert (precision.compute, precision.master) == (compute, master)


@EVERY
@pytest.mark.parametrize("input", ["plain", "attention", "dispatched"])
def test_a_linear_multiplies_in_the_dtype_of_its_input_whatever_that_is(name, compute, master, input):
    ctx = Context(dim=5, init_std=0.3, precision=FullConfig(compute=name).build())
    linear = ctx.linear(5, 3, input=input)
    weight, x = linear.get_parameter("weight"), normal(2, 4, 5, seed=0, dtype=compute).requires_grad_()
    y = linear(x)
    assert (weight.dtype, y.dtype, y.shape) == (master, compute, (2, 4, 3))
    expected = torch.nn.functional.linear(x.double(), weight.to(compute).double())
    assert_close(y, expected, length=5)
    y.sum().backward()
    assert (weight.grad.dtype, x.grad.dtype) == (master, compute)
    assert_close(weight.grad, x.detach().double().sum((0, 1)).expand(3, 5), length=8, dtype=compute)


@EVERY
@pytest.mark.parametrize("input", ["plain", "dispatched"])
def test_a_grouped_linear_is_a_linear_for_each_group(name, compute, master, input):
    ctx = Context(dim=5, init_std=0.3, precision=FullConfig(compute=name).build())
    grouped, counts = ctx.grouped_linear(3, 5, 4, input=input), torch.tensor([2, 0, 3])
    weight, rows = grouped.get_parameter("weight"), normal(5, 5, seed=0, dtype=compute)
    y = grouped(rows, counts)
    assert (weight.dtype, weight.shape, y.dtype) == (master, (3, 4, 5), compute)
    parts = zip(rows.double().split(counts.tolist()), weight.to(compute).double(), strict=True)
    assert_close(y, torch.cat([part @ matrix.t() for part, matrix in parts]), length=5)


@EVERY
def test_a_block_computes_in_the_one_and_keeps_its_parameters_and_gradients_in_the_other(name, compute, master):
    ctx = Context(dim=6, init_std=0.3, precision=FullConfig(compute=name).build())
    block = Block(SMALL_BLOCK, ctx)
    out, stats = block(normal(1, 4, 6, seed=0, dtype=compute), *documents([[0, 0, 1, 1]]))
    assert out.dtype == compute
    assert stats is not None
    assert stats.affinity.dtype == master
    out.float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in block.parameters()} == {master}


def test_a_dtype_that_is_not_known_is_refused_by_name():
    with pytest.raises(ValueError, match=r"compute.*float16"):
        FullConfig(compute="float16")

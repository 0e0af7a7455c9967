"""One dtype for every product: what it names, and what a block then returns."""

import pytest
import torch
from builders import SMALL_BLOCK

from tangram.core.block import Block
from tangram.core.context import Context
from tangram.plugins.precision.full import FullConfig
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

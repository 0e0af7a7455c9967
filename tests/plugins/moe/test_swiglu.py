"""The dense feed-forward against its equation."""

import paper
import pytest
import torch
from builders import assert_same_function
from hypothesis import given
from hypothesis import strategies as st

from tangram.plugins.moe.swiglu import SwiGLU, SwiGLUConfig
from tangram.testing import seeds
from tangram.testing.samples import context, filled, normal

DIM = 5
LENGTH = 60


def built(hidden: int, seed: int = 0) -> SwiGLU:
    module = SwiGLUConfig(hidden=hidden).build(context(DIM))
    assert isinstance(module, SwiGLU)
    return filled(module, seed)


@given(hidden=st.integers(1, 6), shape=st.tuples(st.integers(1, 2), st.integers(1, 4)), seed=seeds())
def test_values_and_gradients_are_the_equation(hidden, shape, seed):
    module, x = built(hidden, seed), normal(*shape, DIM, seed=seed + 1).requires_grad_()
    gate_up, down = module.get_parameter("gate_up.weight"), module.get_parameter("down.weight")
    expected = torch.stack([paper.swiglu(token, gate_up, down) for token in x.flatten(0, 1)]).view_as(x)
    wrt = {"x": x, "gate_up": gate_up, "down": down}
    assert_same_function(module(x).hidden, expected, wrt, length=LENGTH, seed=seed)


def test_all_its_parameters_are_active():
    assert built(7).active_parameters() == 3 * DIM * 7


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_input(compute):
    module = SwiGLUConfig(hidden=3).build(context(DIM, compute=compute))
    assert module(normal(1, 2, DIM, seed=0, dtype=compute)).hidden.dtype == compute


def test_no_width_is_refused():
    with pytest.raises(ValueError, match="hidden"):
        SwiGLUConfig(hidden=0)

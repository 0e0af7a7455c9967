"""Whole parameters on every rank: the global norm, clipping, and what is left alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny
from torch import Tensor

from tangram.core.context import Parallel
from tangram.core.model import Model, build_model
from tangram.plugins.parallel.replicate import ReplicateConfig
from tangram.testing import seeds
from tangram.testing.samples import normal


@pytest.fixture(scope="module")
def model() -> Model:
    return build_model(tiny())


def given_gradients(model: Model, seed: int, scale: float) -> dict[str, Tensor]:
    """Give every parameter but the embedding a gradient, and return copies."""
    grads = {}
    for i, (address, parameter) in enumerate(model.named_parameters()):
        parameter.grad = None
        if address != "embedding.weight":
            parameter.grad = normal(*parameter.shape, seed=seed + i, dtype=parameter.dtype) * scale
            grads[address] = parameter.grad.clone()
    return grads


@given(seed=seeds(), scale=st.sampled_from((1e-3, 1.0, 1e3)), limit=st.sampled_from((0.1, 1.0, 50.0)))
def test_clipping_is_torchs(model, seed, scale, limit):
    sharding = ReplicateConfig().build(Parallel())
    sharding.attach(model)
    given_gradients(model, seed, scale)
    expected = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    wanted = {address: p.grad.clone() for address, p in model.named_parameters() if p.grad is not None}
    given_gradients(model, seed, scale)
    norm = sharding.clip(limit)
    assert norm.broken == ()
    # The largest sum is over a parameter's elements, in float32; torch adds 1e-6 to the norm it divides by.
    assert norm.value == pytest.approx(expected, rel=1e-5)
    for address, grad in wanted.items():
        torch.testing.assert_close(model.get_parameter(address).grad, grad, rtol=1e-5 + 1e-6 / limit, atol=0)
    assert model.embedding.weight.grad is None


def test_the_optimizer_steps_every_parameter_itself(model):
    sharding = ReplicateConfig().build(Parallel())
    attached = sharding.attach(model)
    assert dict(attached).keys() == dict(model.named_parameters()).keys()
    assert all(parameter is model.get_parameter(address) for address, parameter in attached)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = given_gradients(model, seed=0, scale=1.0)
    sharding.reduce()
    sharding.gather()
    assert all(torch.equal(model.get_parameter(address).grad, grad) for address, grad in grads.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

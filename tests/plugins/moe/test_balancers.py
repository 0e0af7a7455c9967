"""Auxiliary-loss-free balancing against the paper's rule (arXiv:2408.15664, algorithm 1), and none."""

import paper
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.contracts import Balancer
from tangram.core.curve import Curve
from tangram.core.records import Progress, violation
from tangram.plugins.moe.balancers import AuxFreeConfig, NoneConfig
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.testing import seeds
from tangram.testing.samples import context, filled, normal

LOADS = st.integers(1, 8).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=1, max_size=6)
)


def aux_free(n_experts: int, speed: float | Curve = 0.001) -> Balancer:
    curve = speed if isinstance(speed, Curve) else Curve.constant(speed)
    return AuxFreeConfig(speed=curve).build(context(4), n_experts)


@given(loads=LOADS, speed=st.sampled_from((0.001, 0.01, 0.0)))
def test_biases_move_over_steps_as_the_papers(loads, speed):
    balancer, expected = aux_free(len(loads[0]), speed), torch.zeros(len(loads[0]), dtype=torch.float64)
    for step, load in enumerate(loads):
        balancer.update(torch.tensor(load), Progress(step=step))
        expected = paper.bias_update(expected, load, speed)
    # Each step rounds the speed and the sum once, in float32.
    bound = 2 * len(loads) * torch.finfo(torch.float32).eps * speed * len(loads)
    assert (balancer.bias() - expected).abs().max() <= bound


@given(count=st.integers(0, 2**40), n_experts=st.integers(1, 7))
def test_an_equal_load_moves_nothing(count, n_experts):
    balancer = aux_free(n_experts)
    balancer.update(torch.full((n_experts,), count), Progress())
    assert not balancer.bias().any()


def test_an_overloaded_expert_falls_by_exactly_the_speed_and_one_at_the_mean_stays():
    balancer = aux_free(4, 0.25)
    balancer.update(torch.tensor([9, 1, 5, 5]), Progress())
    assert balancer.bias().tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_a_difference_of_one_token_among_billions_is_seen():
    balancer = aux_free(2, 0.5)
    balancer.update(torch.tensor([2**33, 2**33 + 1]), Progress())
    assert balancer.bias().tolist() == [0.5, -0.5]


def test_the_speed_follows_its_curve():
    balancer = aux_free(2, Curve.parse([{"until": 100, "value": 0.5}, {"value": 0.0}]))
    balancer.update(torch.tensor([3, 1]), Progress(tokens=99))
    assert balancer.bias().tolist() == [-0.5, 0.5]
    balancer.update(torch.tensor([3, 1]), Progress(tokens=100))
    assert balancer.bias().tolist() == [-0.5, 0.5]


def test_biases_are_float32_state_without_a_gradient_and_survive_a_checkpoint():
    balancer = aux_free(3).to(torch.float32)
    balancer.update(torch.tensor([5, 0, 1]), Progress())
    assert list(balancer.parameters()) == []
    restored = aux_free(3)
    restored.load_state_dict(balancer.state_dict())
    assert restored.bias().dtype == torch.float32
    assert torch.equal(restored.bias(), balancer.bias())


def skewed(balancer: Balancer, seed: int, steps: int) -> list[Tensor]:
    """Return the load of each step of a router that prefers the first experts for the same tokens."""
    router = filled(GroupLimitedConfig(top_k=2).build(context(4), 8), seed, std=0.3)
    with torch.no_grad():
        router.get_parameter("centroids.weight")[:2] += 1.0
    x = 1.0 + normal(1, 256, 4, seed=seed + 1)
    loads = []
    for step in range(steps):
        loads.append(router(x, balancer.bias()).stats.load.sum(0))
        balancer.update(loads[-1], Progress(step=step))
    return loads


@given(seed=seeds())
def test_a_skewed_load_becomes_even(seed):
    slowing = Curve.parse([{"until_step": 100, "from": 0.03, "to": 0.001, "shape": "linear"}, {"value": 0.001}])
    loads = skewed(aux_free(8, slowing), seed, steps=120)
    assert float(violation(loads[0])) > 1.0
    assert float(violation(torch.stack(loads[-10:]).sum(0))) < 0.3


def test_without_balancing_nothing_ever_moves():
    balancer = NoneConfig().build(context(4), 8)
    first, *_, last = skewed(balancer, seed=0, steps=3)
    assert torch.equal(first, last)
    assert not balancer.bias().any()
    assert balancer.bias().dtype == torch.float32
    assert balancer.state_dict() == {}


@pytest.mark.parametrize(("config", "adaptive"), [(AuxFreeConfig(), True), (NoneConfig(), False)])
def test_it_says_whether_it_adapts(config, adaptive):
    assert config.build(context(4), 2).adaptive is adaptive

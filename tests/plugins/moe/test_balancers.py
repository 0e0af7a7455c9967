"""Auxiliary-loss-free balancing against the paper's rule (arXiv:2408.15664, algorithm 1), and none."""

import paper
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.contracts import Balancer
from tangram.core.curve import Curve
from tangram.core.records import Progress
from tangram.plugins.moe.balancers import AuxFreeConfig, NoneConfig
from tangram.testing.samples import context

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


def test_an_overloaded_expert_falls_by_exactly_the_speed_and_one_at_the_mean_stays():
    balancer = aux_free(4, 0.25)
    balancer.update(torch.tensor([9, 1, 5, 5]), Progress())
    assert balancer.bias().tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_the_speed_follows_its_curve():
    balancer = aux_free(2, Curve.parse([{"until": 100, "value": 0.5}, {"value": 0.0}]))
    balancer.update(torch.tensor([3, 1]), Progress(tokens=99))
    assert balancer.bias().tolist() == [-0.5, 0.5]
    balancer.update(torch.tensor([3, 1]), Progress(tokens=100))
    assert balancer.bias().tolist() == [-0.5, 0.5]


@pytest.mark.parametrize(("config", "adaptive"), [(AuxFreeConfig(), True), (NoneConfig(), False)])
def test_it_says_whether_it_adapts(config, adaptive):
    assert config.build(context(4), 2).adaptive is adaptive

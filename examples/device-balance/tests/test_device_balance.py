"""Both losses against loops that read like the paper's equations, and what every objective owes."""

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from tangram_device_balance import CommunicationBalanceConfig, DeviceBalanceConfig

from tangram.core import load_preset
from tangram.core.context import Context
from tangram.core.contracts import RoutingObjective
from tangram.core.records import Batch, RouterStats
from tangram.testing import ObjectiveContract, assert_close

BLOCK = load_preset("v3-tiny").model.block  # with 32 experts


class TestDeviceBalance(ObjectiveContract):
    config = DeviceBalanceConfig(n_devices=2)


class TestCommunicationBalance(ObjectiveContract):
    config = CommunicationBalanceConfig(n_devices=2, top_devices=1)


def routed(ids: torch.Tensor, n_experts: int, seed: int = 0) -> RouterStats:
    """Return the statistics of a choice [B, S, K] under drawn affinities."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*ids.shape[:2], n_experts)
    affinity = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1).mean(1)
    load = torch.nn.functional.one_hot(ids, n_experts).sum((1, 2))
    return RouterStats(ids=ids, load=load, top=load, affinity=affinity.requires_grad_())


def a_batch(sequences: int, length: int) -> Batch:
    tokens = torch.zeros(sequences, length, dtype=torch.int64)
    return Batch(tokens, tokens, tokens, tokens, sequences * length, sequences)


def exactly(value) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def objective(config) -> RoutingObjective:
    return config.build(Context(dim=8), BLOCK)


def by_equations(stats: RouterStats, devices: int, most: int | None) -> float:
    """Return the mean over sequences of equation 26, or with `most` of equation 29, without the weight."""
    n, tokens, top_k = stats.ids.shape
    experts = stats.load.shape[1]
    groups = [range(i * experts // devices, (i + 1) * experts // devices) for i in range(devices)]
    total = 0.0
    for b in range(n):
        chosen = [set(ids) for ids in stats.ids[b].tolist()]
        f = [experts / (top_k * tokens) * sum(j in ids for ids in chosen) for j in range(experts)]  # 24
        p = stats.affinity[b].tolist()  # 25
        for group in groups:
            p_group = sum(p[j] for j in group)  # 28, 31
            if most is None:
                f_group = sum(f[j] for j in group) / len(group)  # 27
            else:
                f_group = devices / (most * tokens) * sum(not ids.isdisjoint(group) for ids in chosen)  # 30
            total += f_group * p_group
    return total / n


@given(
    devices=st.sampled_from([1, 2, 4]),
    per_device=st.integers(1, 3),
    top_k=st.integers(1, 3),
    sequences=st.integers(1, 3),
    length=st.integers(1, 6),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_they_are_the_equations(devices, per_device, top_k, sequences, length, seed) -> None:
    experts = devices * per_device
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(sequences, length, experts, generator=generator)
    stats = routed(draws.topk(min(top_k, experts), -1).indices, experts, seed)
    batch = a_batch(sequences, length)
    terms = sequences * length * experts
    actual = objective(DeviceBalanceConfig(n_devices=devices))(stats, batch)
    assert_close(actual, exactly(by_equations(stats, devices, None)), length=terms)
    most = min(devices, 2)
    actual = objective(CommunicationBalanceConfig(n_devices=devices, top_devices=most))(stats, batch)
    assert_close(actual, exactly(by_equations(stats, devices, most)), length=terms)


def even(sequences: int) -> RouterStats:
    """Return a choice in which each token reaches both experts of one device, and the devices take turns."""
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]).expand(sequences, 4, 2)
    stats = routed(ids, 8)
    return RouterStats(stats.ids, stats.load, stats.top, torch.full((sequences, 8), 0.125, dtype=torch.float64))


def test_what_is_even_costs_one() -> None:
    stats, batch = even(3), a_batch(3, 4)
    assert_close(objective(DeviceBalanceConfig(n_devices=4))(stats, batch), exactly(1.0), length=32)
    config = CommunicationBalanceConfig(n_devices=4, top_devices=1)
    assert_close(objective(config)(stats, batch), exactly(1.0), length=32)


def test_they_are_a_sum_over_the_slice_divided_by_the_global_count() -> None:
    stats = routed(torch.tensor([[[0, 1], [2, 3]], [[0, 2], [1, 3]]]), 4)
    for config in (DeviceBalanceConfig(n_devices=2), CommunicationBalanceConfig(n_devices=2, top_devices=2)):
        alone, of_six = a_batch(2, 2), evolve(a_batch(2, 2), n_sequences=6)
        assert_close(objective(config)(stats, of_six), objective(config)(stats, alone) / 3, length=8)


def test_what_one_device_does_alone_costs_as_much_as_it_is_preferred() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])[None]
    affinity = exactly([[0.4, 0.4, 0.05, 0.05, 0.025, 0.025, 0.025, 0.025]])
    stats = RouterStats(ids, routed(ids, 8).load, routed(ids, 8).load, affinity)
    loss = objective(DeviceBalanceConfig(n_devices=4))(stats, a_batch(1, 4))
    assert_close(loss, exactly(4 * 0.8), length=32)


def test_a_token_is_sent_once_to_a_device_whatever_it_does_there() -> None:
    config = CommunicationBalanceConfig(n_devices=2, top_devices=2)
    together, apart = (routed(torch.tensor([[ids]]), 4) for ids in ([0, 1], [0, 2]))
    share = together.affinity[0, :2].sum()  # of device 0, in both
    assert_close(objective(config)(together, a_batch(1, 1)), share, length=8)
    assert_close(objective(config)(apart, a_batch(1, 1)), exactly(1.0), length=8)


def test_the_gradient_is_the_frequency_of_the_device() -> None:
    stats = routed(torch.tensor([[[0, 1], [0, 3]]]), 4)
    objective(DeviceBalanceConfig(n_devices=2))(stats, a_batch(1, 2)).backward()
    # Experts 0 and 1 took three of the four choices: f' = (2 + 1) / 2 and (0 + 1) / 2.
    assert_close(stats.affinity.grad, exactly([[1.5, 1.5, 0.5, 0.5]]), length=8)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DeviceBalanceConfig(n_devices=3), "n_devices 3 does not divide the 32 experts"),
        (CommunicationBalanceConfig(n_devices=5, top_devices=1), "n_devices 5 does not divide the 32 experts"),
    ],
)
def test_devices_that_do_not_divide_the_experts_are_refused(config, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        objective(config)


def test_more_devices_for_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="top_devices 3 is more than n_devices 2"):
        CommunicationBalanceConfig(n_devices=2, top_devices=3)

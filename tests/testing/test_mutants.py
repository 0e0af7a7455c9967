"""Every law kills its mutants: components with one known fault, most of which shipped somewhere."""

import pytest
from builders import SMALL_MLA, SMALL_MOE
from corpus import tokens

from tangram.plugins.data.tokens import TokensConfig
from tangram.plugins.moe.balancers import AuxFreeConfig
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.plugins.objectives.balance import SequenceBalanceConfig
from tangram.plugins.objectives.mtp import MTPConfig
from tangram.plugins.observers.ema import EMAConfig
from tangram.plugins.parallel.all_to_all import AllToAllConfig
from tangram.plugins.parallel.replicate import ReplicateConfig
from tangram.plugins.parallel.sequential import SequentialConfig
from tangram.plugins.precision.full import FullConfig
from tangram.plugins.training.adamw import AdamWConfig
from tangram.plugins.training.guards import SkipConfig
from tangram.testing import (
    AttentionContract,
    BalancerContract,
    Contract,
    DataContract,
    DispatcherContract,
    FeedForwardContract,
    GuardContract,
    Law,
    ObjectiveContract,
    ObserverContract,
    OptimizerContract,
    PipelineContract,
    PrecisionContract,
    RouterContract,
    ShardingContract,
    Status,
    examine,
)


class MLA(AttentionContract):
    config = SMALL_MLA


class GroupLimited(RouterContract):
    config = GroupLimitedConfig(top_k=3, n_groups=3, top_groups=2, gate_scale=2.5)


class AuxFree(BalancerContract):
    config = AuxFreeConfig()


class AllToAll(DispatcherContract):
    config = AllToAllConfig()


class MoE(FeedForwardContract):
    config = SMALL_MOE


class MTP(ObjectiveContract):
    config = MTPConfig()


class SequenceBalance(ObjectiveContract):
    config = SequenceBalanceConfig()


class Full(PrecisionContract):
    config = FullConfig(compute="bfloat16")


class AdamW(OptimizerContract):
    config = AdamWConfig()


class Skip(GuardContract):
    config = SkipConfig(limit=2)


class Sequential(PipelineContract):
    config = SequentialConfig()


class Replicate(ShardingContract):
    config = ReplicateConfig()


class Tokens(DataContract):
    config = TokensConfig(folder=tokens(), isolate=True)


class EMA(ObserverContract):
    config = EMAConfig(decay=0.5)


TRIED: list[type[Contract]] = [
    MLA,
    GroupLimited,
    AuxFree,
    AllToAll,
    MoE,
    MTP,
    SequenceBalance,
    Full,
    AdamW,
    Skip,
    Sequential,
    Replicate,
    Tokens,
    EMA,
]
"""A component for each slot, of which the mutants are made."""

TRIES = {
    (law.check, mutant): pytest.param(contract, law, mutant, id=f"{contract.__name__}-{law.name}-{mutant.__name__}")
    for contract in reversed(TRIED)
    for law in contract.laws()
    for mutant in law.kills
}
"""Every law with each of its mutants, on the first contract that has it."""


@pytest.mark.parametrize(("contract", "law", "mutant"), TRIES.values())
def test_a_law_kills_its_mutants(contract: type[Contract], law: Law, mutant) -> None:
    found = examine(contract, law, mutant=mutant)
    assert found.status is Status.FAILS, f"{law.name} does not notice that {mutant.__doc__}"
    assert found.example

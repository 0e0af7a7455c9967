"""What each slot owes: one file a slot, one class of laws a file."""

from collections.abc import Mapping

from tangram.testing.contracts.attention import AttentionContract
from tangram.testing.contracts.balancer import BalancerContract
from tangram.testing.contracts.data import DataContract
from tangram.testing.contracts.dispatcher import DispatcherContract
from tangram.testing.contracts.feedforward import FeedForwardContract
from tangram.testing.contracts.guard import GuardContract
from tangram.testing.contracts.objective import ObjectiveContract
from tangram.testing.contracts.observer import ObserverContract
from tangram.testing.contracts.optimizer import OptimizerContract
from tangram.testing.contracts.pipeline import PipelineContract
from tangram.testing.contracts.precision import PrecisionContract
from tangram.testing.contracts.router import RouterContract
from tangram.testing.contracts.sharding import ShardingContract
from tangram.testing.laws import Contract

CONTRACTS: Mapping[str, type[Contract]] = {
    contract.slot: contract
    for contract in (
        AttentionContract,
        BalancerContract,
        DataContract,
        DispatcherContract,
        FeedForwardContract,
        GuardContract,
        ObjectiveContract,
        ObserverContract,
        OptimizerContract,
        PipelineContract,
        PrecisionContract,
        RouterContract,
        ShardingContract,
    )
}
"""The contract of each slot that has laws: all but `launcher`, which trains nothing."""

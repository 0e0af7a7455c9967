"""What each slot owes: one file a slot, one class of laws a file."""

from collections.abc import Mapping

from tangram.testing.contracts.attention import AttentionContract
from tangram.testing.contracts.balancer import BalancerContract
from tangram.testing.contracts.dispatcher import DispatcherContract
from tangram.testing.contracts.feedforward import FeedForwardContract
from tangram.testing.contracts.objective import ObjectiveContract
from tangram.testing.contracts.router import RouterContract
from tangram.testing.laws import Contract

CONTRACTS: Mapping[str, type[Contract]] = {
    contract.slot: contract
    for contract in (
        AttentionContract,
        BalancerContract,
        DispatcherContract,
        FeedForwardContract,
        ObjectiveContract,
        RouterContract,
    )
}
"""The contract of each slot that has laws."""

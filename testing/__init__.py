"""The conformance kit: the laws of every slot, strategies that draw valid inputs, and derived tolerances."""

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
from tangram.testing.laws import Contract, Finding, Law, Status, examine, law
from tangram.testing.preset_laws import check_preset
from tangram.testing.ranks import RankError, run_ranks
from tangram.testing.routed import contexts, routings
from tangram.testing.strategies import batches, configs, curves, hidden, presets, seeds
from tangram.testing.tolerance import assert_close, assert_same_gradients, tolerance

__all__ = [
    "AttentionContract",
    "BalancerContract",
    "Contract",
    "DataContract",
    "DispatcherContract",
    "FeedForwardContract",
    "Finding",
    "GuardContract",
    "Law",
    "ObjectiveContract",
    "ObserverContract",
    "OptimizerContract",
    "PipelineContract",
    "PrecisionContract",
    "RankError",
    "RouterContract",
    "ShardingContract",
    "Status",
    "assert_close",
    "assert_same_gradients",
    "batches",
    "check_preset",
    "configs",
    "contexts",
    "curves",
    "examine",
    "hidden",
    "law",
    "presets",
    "routings",
    "run_ranks",
    "seeds",
    "tolerance",
]

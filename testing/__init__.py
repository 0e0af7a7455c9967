"""The conformance kit: the laws of every slot, strategies that draw valid inputs, and derived tolerances."""

from tangram.testing.contracts.attention import AttentionContract
from tangram.testing.contracts.precision import PrecisionContract
from tangram.testing.laws import Contract, Finding, Law, Status, examine, law
from tangram.testing.strategies import batches, configs, curves, hidden, presets, seeds
from tangram.testing.tolerance import assert_close, assert_same_gradients, tolerance

__all__ = [
    "AttentionContract",
    "Contract",
    "Finding",
    "Law",
    "PrecisionContract",
    "Status",
    "assert_close",
    "assert_same_gradients",
    "batches",
    "configs",
    "curves",
    "examine",
    "hidden",
    "law",
    "presets",
    "seeds",
    "tolerance",
]

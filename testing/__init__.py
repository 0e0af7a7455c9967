"""What authors of components test with: derived tolerances, and strategies that draw valid inputs."""

from tangram.testing.strategies import batches, configs, curves, hidden, presets, seeds
from tangram.testing.tolerance import assert_close, assert_same_gradients, tolerance

__all__ = [
    "assert_close",
    "assert_same_gradients",
    "batches",
    "configs",
    "curves",
    "hidden",
    "presets",
    "seeds",
    "tolerance",
]

"""The precisions keep the laws of their slot."""

from tangram.plugins.precision.full import FullConfig
from tangram.testing import PrecisionContract


class TestFull(PrecisionContract):
    config = FullConfig()


class TestBfloat16(PrecisionContract):
    config = FullConfig(compute="bfloat16")


class TestFloat64(PrecisionContract):
    config = FullConfig(compute="float64")

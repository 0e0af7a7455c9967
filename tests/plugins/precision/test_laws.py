"""The precisions keep the laws of their slot."""

from tangram.plugins.precision.fp8 import FP8Config
from tangram.plugins.precision.full import FullConfig
from tangram.testing import PrecisionContract


class TestFull(PrecisionContract):
    config = FullConfig()


class TestBfloat16(PrecisionContract):
    config = FullConfig(compute="bfloat16")


class TestFloat64(PrecisionContract):
    config = FullConfig(compute="float64")


class TestFP8(PrecisionContract):
    config = FP8Config()


class TestAnyFP8(PrecisionContract):
    config = FP8Config

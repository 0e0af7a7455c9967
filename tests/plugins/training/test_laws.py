"""The optimizers and the guards keep the laws of their slots."""

from tangram.plugins.training.adamw import AdamWConfig
from tangram.plugins.training.guards import RaiseConfig, RollbackConfig, SkipConfig
from tangram.plugins.training.muon import MuonConfig
from tangram.testing import GuardContract, OptimizerContract


class TestAdamW(OptimizerContract):
    config = AdamWConfig()


class TestAdamWWithCoarseMoments(OptimizerContract):
    config = AdamWConfig(moments="bfloat16")


class TestAdamWRoundedAtRandom(OptimizerContract):
    config = AdamWConfig(moments="bfloat16", rounding="stochastic")


class TestAnyAdamW(OptimizerContract):
    config = AdamWConfig


class TestMuon(OptimizerContract):
    config = MuonConfig()


class TestAnyMuon(OptimizerContract):
    config = MuonConfig


class TestRaise(GuardContract):
    config = RaiseConfig()


class TestSkip(GuardContract):
    config = SkipConfig(limit=2)


class TestRollback(GuardContract):
    config = RollbackConfig(window=3, limit=1)


class TestAnySkip(GuardContract):
    config = SkipConfig


class TestAnyRollback(GuardContract):
    config = RollbackConfig

"""The optimizers and the guards keep the laws of their slots."""

from tangram.plugins.training.adamw import AdamWConfig
from tangram.plugins.training.muon import MuonConfig
from tangram.testing import OptimizerContract


class TestAdamW(OptimizerContract):
    config = AdamWConfig()


class TestAdamWWithCoarseMoments(OptimizerContract):
    config = AdamWConfig(moments="bfloat16")


class TestAnyAdamW(OptimizerContract):
    config = AdamWConfig


class TestMuon(OptimizerContract):
    config = MuonConfig()


class TestAnyMuon(OptimizerContract):
    config = MuonConfig

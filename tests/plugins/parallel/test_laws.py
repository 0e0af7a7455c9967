"""The pipelines and the shardings keep the laws of their slots."""

from tangram.plugins.parallel.replicate import ReplicateConfig
from tangram.plugins.parallel.sequential import SequentialConfig
from tangram.testing import PipelineContract, ShardingContract


class TestSequential(PipelineContract):
    config = SequentialConfig()


class TestReplicate(ShardingContract):
    config = ReplicateConfig()

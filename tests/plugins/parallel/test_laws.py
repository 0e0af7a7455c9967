"""The pipelines and the shardings keep the laws of their slots."""

from tangram.plugins.parallel.dualpipe import DualPipeConfig, DualPipeVConfig
from tangram.plugins.parallel.fsdp import FSDPConfig
from tangram.plugins.parallel.gpipe import GPipeConfig
from tangram.plugins.parallel.interleaved import InterleavedConfig
from tangram.plugins.parallel.one_f_one_b import OneFOneBConfig
from tangram.plugins.parallel.replicate import ReplicateConfig
from tangram.plugins.parallel.sequential import SequentialConfig
from tangram.plugins.parallel.zero_bubble import ZeroBubbleConfig
from tangram.testing import PipelineContract, ShardingContract


class TestSequential(PipelineContract):
    config = SequentialConfig()


class TestGPipe(PipelineContract):
    config = GPipeConfig()


class TestOneFOneB(PipelineContract):
    config = OneFOneBConfig()


class TestInterleaved(PipelineContract):
    config = InterleavedConfig


class TestZeroBubble(PipelineContract):
    config = ZeroBubbleConfig()


class TestDualPipe(PipelineContract):
    config = DualPipeConfig()


class TestDualPipeV(PipelineContract):
    config = DualPipeVConfig()


class TestReplicate(ShardingContract):
    config = ReplicateConfig()


class TestFSDP(ShardingContract):
    config = FSDPConfig()

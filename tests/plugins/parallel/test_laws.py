"""The pipelines and the shardings keep the laws of their slots."""

from tangram.plugins.parallel.sequential import SequentialConfig
from tangram.testing import PipelineContract


class TestSequential(PipelineContract):
    config = SequentialConfig()

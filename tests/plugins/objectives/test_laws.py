"""The objectives keep the laws of their slot."""

from tangram.plugins.objectives.balance import BatchBalanceConfig, SequenceBalanceConfig
from tangram.plugins.objectives.mtp import MTPConfig
from tangram.plugins.objectives.next_token import NextTokenConfig
from tangram.testing import ObjectiveContract


class TestNextToken(ObjectiveContract):
    config = NextTokenConfig()


class TestMTP(ObjectiveContract):
    config = MTPConfig(depth=2)


class TestMTPBeforeTheNorm(ObjectiveContract):
    config = MTPConfig(input="pre_norm")


class TestSequenceBalance(ObjectiveContract):
    config = SequenceBalanceConfig()


class TestSequenceBalanceOfTheRouted(ObjectiveContract):
    config = SequenceBalanceConfig(count="routed")


class TestBatchBalance(ObjectiveContract):
    config = BatchBalanceConfig()

"""The attentions keep the laws of their slot."""

from attrs import evolve
from builders import SMALL_MLA

from tangram.plugins.attention.gqa import GQAConfig
from tangram.testing import AttentionContract


class TestMLA(AttentionContract):
    config = SMALL_MLA


class TestMLAWithoutQueryLatent(AttentionContract):
    config = evolve(SMALL_MLA, q_rank=None, value_dim=9)


class TestGQA(AttentionContract):
    config = GQAConfig(n_heads=4, n_kv_heads=2, head_dim=4)


class TestMHA(AttentionContract):
    config = GQAConfig(n_heads=2, head_dim=4)


class TestMQA(AttentionContract):
    config = GQAConfig(n_heads=3, n_kv_heads=1, head_dim=2)

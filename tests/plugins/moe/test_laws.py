"""Routers, balancers, dispatchers and feed-forwards keep the laws of their slots."""

from attrs import evolve
from builders import SMALL_MOE

from tangram.core.curve import Curve
from tangram.plugins.moe.balancers import AuxFreeConfig, NoneConfig
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.plugins.moe.local import LocalConfig
from tangram.plugins.moe.moe import MoEConfig
from tangram.plugins.moe.swiglu import SwiGLUConfig
from tangram.plugins.moe.top_k import TopKConfig
from tangram.testing import BalancerContract, DispatcherContract, FeedForwardContract, RouterContract


class TestGroupLimited(RouterContract):
    config = GroupLimitedConfig(top_k=3, n_groups=3, top_groups=2, gate_scale=2.5)


class TestGroupLimitedBySoftmax(RouterContract):
    config = GroupLimitedConfig(top_k=2, score="softmax", n_groups=2, normalise=False)


class TestTopK(RouterContract):
    config = TopKConfig(top_k=2)


class TestTopOneBySigmoid(RouterContract):
    config = TopKConfig(top_k=1, score="sigmoid", normalise=False)


class TestAuxFree(BalancerContract):
    config = AuxFreeConfig()


class TestAuxFreeThatSlows(BalancerContract):
    config = AuxFreeConfig(
        speed=Curve.parse([{"until_step": 2000, "from": 0.0, "to": 0.01, "shape": "linear"}, {"value": 0.0}])
    )


class TestUnbalanced(BalancerContract):
    config = NoneConfig()


class TestLocal(DispatcherContract):
    config = LocalConfig()


class TestMoE(FeedForwardContract):
    config = SMALL_MOE


class TestMoEUnbalanced(FeedForwardContract):
    config = evolve(SMALL_MOE, n_experts=5, n_shared=0, router=TopKConfig(top_k=1), balancer=NoneConfig())


class TestAnyMoE(FeedForwardContract):
    config = MoEConfig


class TestSwiGLU(FeedForwardContract):
    config = SwiGLUConfig(hidden=3)

"""The smallest sharding of several ranks: whole parameters, and one sum for each gradient."""

import torch
from attrs import frozen
from torch import distributed

from tangram.core.context import Parallel
from tangram.core.registry import component
from tangram.plugins.parallel.replicate import Replicate


@component("sharding", use="all_reduce", capabilities=["ranks"])
@frozen(kw_only=True)
class AllReduceConfig:
    """Sum every gradient over the ranks."""

    def build(self, parallel: Parallel) -> "AllReduce":
        return AllReduce()


class AllReduce(Replicate):
    """Data parallelism."""

    def reduce(self) -> None:
        if not distributed.is_initialized():
            return
        for _, parameter in self.parameters:
            if parameter.grad is None:  # a rank whose rows do not reach it adds nothing
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)

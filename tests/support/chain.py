"""A program of linears, whose steps take no time."""

from collections.abc import Mapping, Sequence

import torch
from attrs import evolve
from torch import nn

from tangram.core.autograd import WeightGrads
from tangram.core.context import Context, Parallel
from tangram.core.layers import Linear
from tangram.core.records import Batch, Carry, Loss, Phase, Progress


class Chain(nn.Module):
    """A program of several stages with a loss on each, as routing objectives put one on inner stages."""

    load_shape, dim, compute = (1, 1), 6, torch.float64

    def __init__(self, n_stages: int) -> None:
        super().__init__()
        self.n_stages = n_stages
        self.queue = WeightGrads()
        ctx = Context(dim=6, parallel=Parallel(self.queue), init_std=0.5)
        self.linears = nn.ModuleList(Linear(ctx, 6, 6) for _ in range(n_stages)).double()

    def phases(self, stage: int, batch: Batch, now: Progress) -> Sequence[Phase]:
        def enter(carry: Carry) -> Carry:
            return evolve(carry, hidden=nn.functional.one_hot(batch.tokens, 6).double())

        def run(carry: Carry) -> Carry:
            hidden = self.linears[stage](carry.hidden).tanh()
            loss = Loss(hidden.square().sum() / batch.n_sequences)
            return evolve(carry, hidden=hidden, losses=(*carry.losses, ("square", loss)))

        return [*([Phase("enter", "compute", enter)] if stage == 0 else []), Phase("run", "compute", run)]

    def weights(self, now: Progress) -> Mapping[str, float]:
        return {"square": 0.5}


def small_batch(n: int) -> Batch:
    tokens = torch.randint(0, 6, (n, 5), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, tokens, tokens, torch.zeros_like(tokens), tokens.numel(), n)

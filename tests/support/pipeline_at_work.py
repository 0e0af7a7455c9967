"""A rank of a pipeline: imported by the processes of the tests that run one."""

import torch
from tiny import exact
from torch import distributed

from tangram.core.context import Parallel
from tangram.core.executor import Executor
from tangram.core.model import build_model
from tangram.core.plan import Plan
from tangram.core.records import Progress
from tangram.plugins.parallel.dualpipe import DualPipe, DualPipeV
from tangram.plugins.parallel.gpipe import GPipe
from tangram.plugins.parallel.interleaved import Interleaved
from tangram.plugins.parallel.one_f_one_b import OneFOneB
from tangram.plugins.parallel.zero_bubble import ZeroBubble

SEQUENCES = 8
PIPELINES = {
    "gpipe": GPipe(),
    "one_f_one_b": OneFOneB(),
    "zero_bubble": ZeroBubble(),
    "interleaved": Interleaved(2),
    "dualpipe": DualPipe(),
    "dualpipev": DualPipeV(),
}

Worked = tuple[dict[str, float], torch.Tensor, dict[str, torch.Tensor]]
"""Losses, loads and gradients."""


def experiment(layers: int, sequences: int):
    """Return the small V3 in float64 with MTP of depth 2."""
    return exact(f"model.blocks.1.repeat={layers - 1}", "objectives.mtp.depth=2", f"train.batch_sequences={sequences}")


def step(plan: Plan, layers: int, rank: int = 0) -> Worked:
    """Work one step as a rank of a plan, and return what it left here."""
    sequences = sum(plan.microbatches)
    wanted, parallel = experiment(layers, sequences), Parallel()
    model = build_model(wanted, 3, parallel=parallel, n_stages=plan.stages)
    data = wanted.data.build(wanted.train, wanted.model.vocab_size)
    executor = Executor(model, lambda _: plan, 1, parallel.weight_grads, lambda: None, rank)
    result = executor.run(data.batch(Progress(), sequences), Progress())
    gradients = {address: p.grad for address, p in model.named_parameters() if p.grad is not None}
    return dict(result.losses), result.load, gradients


def ranks(rank: int, names: list[str], n: int, layers: int, sequences: int) -> dict[str, Worked]:
    """Work one step of each pipeline on n ranks; the first returns the losses, the loads and all gradients."""
    found = {}
    for name in names:
        plan = PIPELINES[name].schedule(n, sequences)
        losses, load, gradients = step(plan, layers, rank)
        everywhere: list[dict[str, torch.Tensor]] = [{} for _ in range(n)]
        distributed.all_gather_object(everywhere, gradients)
        summed: dict[str, torch.Tensor] = {}
        for each in everywhere:
            for address, gradient in each.items():
                summed[address] = summed[address] + gradient if address in summed else gradient
        found[name] = losses, load, summed
    return found if rank == 0 else {}

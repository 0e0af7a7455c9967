"""One step of every pipeline, all its ranks in one process."""

import torch
from tiny import exact

from tangram.core.context import Parallel
from tangram.core.executor import Executor
from tangram.core.layout import Layout
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


def experiment(layers: int, sequences: int, *overrides: str):
    """Return the small V3 in float64 with MTP of depth 2."""
    sizes = f"model.blocks.1.repeat={layers - 1}", f"train.batch_sequences={sequences}"
    return exact(*sizes, "objectives.mtp.depth=2", *overrides)


def on_one(stages: int) -> Parallel:
    """Return where one rank holds all of so many stages."""
    return Parallel(layout=Layout({(0, stage): 0 for stage in range(stages)}))


def step(plan: Plan, layers: int, *overrides: str, device: str | torch.device = "cpu") -> Worked:
    """Work one step of a plan of one rank, and return what it left here."""
    sequences = sum(plan.microbatches)
    wanted = experiment(layers, sequences, *overrides)
    parallel = Parallel(layout=Layout(plan.place), device=torch.device(device))
    model = build_model(wanted, 3, device, parallel)
    data = wanted.data.build(wanted.train, wanted.model.vocab_size)
    executor = Executor(model, lambda _: plan, 1, parallel, lambda: None)
    result = executor.run(data.batch(Progress(), sequences), Progress())
    gradients = {address: p.grad for address, p in model.named_parameters() if p.grad is not None}
    return dict(result.losses), result.load, gradients

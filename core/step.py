"""The step is the documentation: everything that changes a weight or a bias is on this page."""

import torch
from attrs import define

from tangram.core.context import Parallel
from tangram.core.contracts import Data, Guard, Sharding
from tangram.core.executor import Executor
from tangram.core.experiment import Experiment
from tangram.core.model import Model
from tangram.core.records import Batch, Progress, StepReport, Verdict


@define(eq=False)
class Trainer:
    """What a step works on.

    Attributes:
        experiment: The resolved preset.
        model: The model.
        executor: Runs forward, backward and the reduction.
        sharding: Who keeps which parameter.
        optimizer: What moves the weights.
        guard: What judges a step.
        data: Where batches come from.
        progress: How far the run has come.
        parallel: Where this rank stands among all.
    """

    experiment: Experiment
    model: Model
    executor: Executor
    sharding: Sharding
    optimizer: torch.optim.Optimizer
    guard: Guard
    data: Data
    progress: Progress
    parallel: Parallel


def train_step(run: Trainer, batch: Batch) -> StepReport:
    """Take one optimizer step on the global `batch`.

    Raises:
        NonFiniteError: The guard stops the run.
    """
    now = run.progress
    lr = set_lr(run.optimizer, run.experiment.train.lr(now))
    result = run.executor.run(batch, now)  # forward, backward and, after the last weight gradient, the reduction
    norm = run.sharding.clip(run.experiment.train.clip)
    verdict = run.guard.judge(result, norm)
    if verdict is Verdict.ACCEPT:
        run.optimizer.step()
        run.sharding.gather()
        run.model.rebalance(result.load, now)  # auxiliary-loss-free bias, after the step
    run.optimizer.zero_grad(set_to_none=True)
    run.progress = now.after(batch)
    return StepReport.of(now, batch, lr, result, norm, verdict)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the learning rate of every group and return it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr

"""Losses on held-out text."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from tangram.core.contracts import Measured
from tangram.core.executor import Executor
from tangram.core.model import Model
from tangram.core.plan import forward_only
from tangram.core.records import EvalReport
from tangram.core.step import Trainer


def evaluate(run: Trainer, limit: int | None = None) -> EvalReport | None:
    """Return the losses on held-out text, all of it or `limit` sequences; None where there is none."""
    held_out = run.data.held_out
    if held_out is None:
        return None
    micro = run.experiment.train.micro_sequences
    layout = run.parallel.layout
    executor = Executor(run.model, partial(forward_only, layout.place), micro, run.parallel, lambda: None)
    nats: dict[str, float] = {}
    targets, size = 0, 0
    at_once = micro * layout.ranks  # so that all ranks of a pipeline have something to do
    batches = held_out.batches(at_once)
    measures: dict[str, dict[int, float]] = {}
    for batch, n_bytes in batches if limit is None else islice(batches, math.ceil(limit / at_once)):
        with nullcontext() if targets else _measured(run.model, measures):
            result = executor.run(batch, run.progress)
        for name, loss in result.losses.items():
            nats[name] = nats.get(name, 0.0) + loss * batch.n_targets
        targets, size = targets + batch.n_targets, size + n_bytes
    everyone = range(layout.ranks)
    for name, layer, value in run.parallel.groups.gather(
        [(name, layer, value) for name, layers in measures.items() for layer, value in layers.items()], everyone
    ):
        layers = measures.setdefault(name, {})
        layers[layer] = max(value, layers.get(layer, value))
    losses = {name: value / targets for name, value in nats.items() if name in run.model.on_tokens}
    bits = nats["next_token"] / math.log(2) / size if "next_token" in nats and size else None
    complete = size == held_out.n_bytes
    return EvalReport(run.progress, losses, bits, targets, size, complete, measures)


@contextmanager
def _measured(model: Model, found: dict[str, dict[int, float]]) -> Iterator[None]:
    """Ask every module that can for its measures of what passes inside; of a layer the largest is kept."""

    def ask(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Measured)
        for name, value in module.measures(*inputs).items():
            layers = found.setdefault(name, {})
            layers[module.layer] = max(value, layers.get(module.layer, value))

    hooks = [module.register_forward_pre_hook(ask) for module in model.modules() if isinstance(module, Measured)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def with_weights(model: Model, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the model other weights, by address, inside; its buffers stay."""
    parameters = dict(model.named_parameters())
    own = {address: parameter.detach().clone() for address, parameter in parameters.items()}
    try:
        set_weights(model, weights)
        yield
    finally:
        set_weights(model, own)


def set_weights(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by address into the model's parameters.

    Raises:
        KeyError: They are not those of this model.
    """
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise KeyError(f"{min(weights.keys() ^ parameters.keys())} is in only one of the model and the weights")
    with torch.no_grad():
        for address, parameter in parameters.items():
            parameter.copy_(weights[address])

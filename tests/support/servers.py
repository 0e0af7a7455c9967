"""A rank that runs a model forward with redundant experts: imported by the processes of the tests that do."""

from collections.abc import Mapping
from functools import partial

import torch
from attrs import evolve, frozen
from tiny import exact
from torch import Tensor, nn

from tangram.core.context import Parallel
from tangram.core.executor import Executor
from tangram.core.layout import Layout
from tangram.core.model import Model, build_model
from tangram.core.plan import forward_only
from tangram.core.records import Progress
from tangram.plugins.parallel.redundancy import Balance, Redundancy

SPARE, EVERY, BATCHES = 8, 2, 5


@frozen(eq=False)
class Served:
    """What a rank saw.

    Attributes:
        losses: Of each batch.
        loads: Tokens of each expert in each batch, of all ranks.
        rows: By layer, the rows that this rank's experts were given in each batch.
        balances: What was said after each batch.
        kept: Whether the model is as it was before.
    """

    losses: list[Mapping[str, float]]
    loads: list[Tensor]
    rows: Mapping[int, list[int]]
    balances: list[Mapping[int, Balance]]
    kept: bool


def built(parallel: Parallel, dispatcher: str) -> Model:
    """Return a rank's share of the small V3, its router told to want the first experts."""
    model = build_model(exact(f"model.block.feedforward.dispatcher={dispatcher}"), 3, parallel=parallel)
    for bias in model.biases().values():
        bias.copy_(-0.02 * torch.arange(len(bias)))
    return model


def several(rank: int, ranks: int, cases: Mapping[str, int]) -> list[tuple[Served, Served]]:
    """Serve with each of some dispatchers and its number of nodes."""
    parallel = Parallel(layout=Layout(data_ranks=ranks, expert_ranks=ranks, rank=rank))
    return [served(parallel, dispatcher, nodes) for dispatcher, nodes in cases.items()]


def served(parallel: Parallel, dispatcher: str, nodes: int) -> tuple[Served, Served]:
    """Run batches forward with experts as in training, and with redundant ones."""
    model = built(parallel, dispatcher)
    before = _identity(model)
    plain = _run(model, parallel, None)
    with Redundancy(model, parallel, spare=SPARE, groups=4, nodes=nodes, every=EVERY) as redundancy:
        redundant = _run(model, parallel, redundancy)
    return plain, evolve(redundant, kept=_identity(model) == before)


def _run(model: Model, parallel: Parallel, redundancy: Redundancy | None) -> Served:
    experiment = exact()
    executor = Executor(model, partial(forward_only, parallel.layout.place), 2, parallel, lambda: None)
    data = experiment.data.build(experiment.train, experiment.model.vocab_size)
    found, now = Served([], [], {}, [], True), Progress()
    hooks = [_count(module, found.rows.setdefault(layer, [])) for layer, module in _experts(model).items()]
    for _ in range(BATCHES):
        batch = data.batch(now, 8)
        result = executor.run(batch, now)
        found.losses.append(result.losses)
        found.loads.append(result.load)
        if redundancy is not None:
            found.balances.append(redundancy.after(result.load))
        now = now.after(batch)
    for hook in hooks:
        hook.remove()
    return found


def _experts(model: Model) -> dict[int, nn.Module]:
    """Return the module that the rows of each layer go through first."""
    return {
        layer: feedforward.get_submodule("gate_up")
        for layer, feedforward in model.feedforwards().items()
        if feedforward.n_experts
    }


def _count(module: nn.Module, seen: list[int]):
    return module.register_forward_pre_hook(lambda _, given: seen.append(int(given[1].sum())))


def _identity(model: Model) -> dict[str, int]:
    parameters = {address: id(parameter) for address, parameter in model.named_parameters()}
    sent = {f"dispatcher {layer}": id(vars(each).get("dispatcher")) for layer, each in model.feedforwards().items()}
    return parameters | sent

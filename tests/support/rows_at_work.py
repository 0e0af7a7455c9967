"""Ranks that keep rows of parameters, as the tests of the sharding fsdp have them: imported by their processes."""

import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from attrs import frozen
from tiny import exact
from torch import nn

from tangram.core import load_preset
from tangram.core.assembly import Seat, assemble, sequences_at
from tangram.core.checkpoint import Found
from tangram.core.model import build_model
from tangram.core.run import train
from tangram.core.session import Outcome


@frozen
class Memory:
    """Bytes of parameters and of their gradients on a rank, of all that are alive once it holds its part.

    Attributes:
        model: Of the parameters of the whole model.
        between: Of the parameters, before and after each step.
        most: Of the parameters, the most at any time in a step.
        gradients: Of the gradients, after each backward and its reduction.
        most_gradients: Of the gradients, the most at any time in a step.
        foreign: Addresses that, read of their modules, are not those of the whole model.
    """

    model: int
    between: tuple[int, ...]
    most: int
    gradients: tuple[int, ...]
    most_gradients: int
    foreign: tuple[str, ...]


def memory(rank: int, ranks: int, overrides: Sequence[str]) -> Memory:
    """Take two steps and look at the memory whenever a module is called, forward or in recomputation."""
    experiment = exact(*overrides)
    run, whole = assemble(experiment, Seat(rank, ranks)), build_model(experiment)
    model = sum(p.nbytes for p in whole.parameters())
    foreign = tuple(
        address
        for address, parameter in whole.named_parameters()
        for module, _, name in (address.rpartition("."),)
        if not torch.equal(getattr(run.model.get_submodule(module), name), parameter)
    )
    del whole
    run.sharding.reduce()
    gc.collect()
    alive = [each for each in gc.get_objects() if issubclass(type(each), nn.Parameter)]
    between, most, gradients, most_gradients = [_bytes(alive)[0]], 0, [], 0

    def look(*_: object) -> None:
        nonlocal most, most_gradients
        here, grads = _bytes(alive)
        most, most_gradients = max(most, here), max(most_gradients, grads)

    for module in run.model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(look)
    for _ in range(2):
        now = run.progress
        batch = run.data.batch(now, sequences_at(experiment, now, ranks))
        run.executor.run(batch, now)
        gradients.append(_bytes(alive)[1])
        for group in run.optimizer.param_groups:
            group["lr"] = 0.01
        run.optimizer.step()
        run.sharding.gather()
        run.optimizer.zero_grad(set_to_none=True)
        run.progress = now.after(batch)
        between.append(_bytes(alive)[0])
    return Memory(model, tuple(between), most, tuple(gradients), most_gradients, foreign)


def _bytes(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """Return the bytes of parameters, and of their gradients."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in parameters}
    return sum(storages.values()), sum(each.grad.nbytes for each in parameters if each.grad is not None)


def trained(rank: int, ranks: int, preset: Path, out: Path, overrides: Sequence[str], found: Found | None) -> Outcome:
    """Train into a run directory, from a checkpoint where there is one."""
    outcome = train(load_preset(preset, *overrides), out, resume=found or False, seat=Seat(rank, ranks))
    return outcome if rank == 0 else None


def several_trained(
    rank: int, ranks: int, runs: Sequence[tuple[Path, Path, Sequence[str], Found | None]]
) -> list[Outcome]:
    """Train several runs one after the other on the same processes."""
    return [trained(rank, ranks, *each) for each in runs]

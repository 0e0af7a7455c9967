"""The kit on another device: what conforms on a CPU conforms there, and what makes a tensor on the CPU is seen to."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerator
import pytest
import torch
from attrs import evolve
from builders import SMALL_MLA, SMALL_MOE
from torch import Tensor

from tangram.core.hookspecs import HOOKIMPL
from tangram.core.islands import mapped
from tangram.core.model import Model
from tangram.core.plugins import Plugins
from tangram.plugins.moe.balancers import AuxFreeConfig
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.plugins.moe.local import LocalConfig
from tangram.plugins.objectives.next_token import NextTokenConfig
from tangram.plugins.observers.jsonl import JsonlConfig
from tangram.plugins.precision.full import FullConfig
from tangram.plugins.training.adamw import AdamWConfig
from tangram.plugins.training.guards import SkipConfig
from tangram.testing import Contract, Law, Status, examine
from tangram.testing.checks import run_checks
from tangram.testing.contracts import CONTRACTS


def of_both(tensor: Tensor) -> Tensor:
    """Return the tensor, to which zeros of the CPU were added."""
    return tensor + torch.zeros(tensor.shape, dtype=tensor.dtype)


def in_its(name: str) -> Callable[[Any], Any]:
    """Return the mutant whose method adds zeros of the CPU to what it is given first."""

    def mutant(built: Any) -> Any:
        method = getattr(built, name)
        setattr(built, name, lambda first, *others: method(mapped(of_both, first), *others))
        return built

    return mutant


def in_its_linears(precision: Any) -> Any:
    linear = precision.linear
    precision.linear = lambda *sizes, **named: in_its("forward")(linear(*sizes, **named))
    return precision


def in_its_step(optimizer: Any) -> Any:
    step = optimizer.step

    def stepping() -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.data = of_both(parameter.data)
        step()

    optimizer.step = stepping
    return optimizer


class Watching:
    """An observer that adds zeros of the CPU to a weight that it is shown, and keeps the sum to itself."""

    def __init__(self, observer: object) -> None:
        pass

    @HOOKIMPL
    def tangram_model_built(self, model: Model) -> None:
        of_both(next(model.parameters()))


class Tried(NamedTuple):
    config: object
    mutant: Callable[[Any], Any]


TRIED = {
    "attention": Tried(SMALL_MLA, in_its("forward")),
    "balancer": Tried(AuxFreeConfig(), in_its("update")),
    "dispatcher": Tried(LocalConfig(), in_its("dispatch")),
    "feedforward": Tried(SMALL_MOE, in_its("forward")),
    "guard": Tried(SkipConfig(limit=2), in_its("judge")),
    "objective": Tried(NextTokenConfig(), in_its("forward")),
    "observer": Tried(JsonlConfig(), Watching),
    "optimizer": Tried(AdamWConfig(), in_its_step),
    "precision": Tried(FullConfig(compute="float64"), in_its_linears),
    "router": Tried(GroupLimitedConfig(top_k=3, n_groups=3, top_groups=2), in_its("forward")),
}
"""A component of a slot whose laws follow a device, and how one can forget where its tensors are."""

FOLLOWING = {*TRIED, "sharding"}
"""Slots whose laws follow a device; those of shardings take a while."""


def tried_on(device: str, slot: str) -> type[Contract]:
    return type("On", (CONTRACTS[slot],), {"config": TRIED[slot].config, "device": device})


def laws(contract: type[Contract]) -> list[Law]:
    """Return its laws, of which one example is enough: the device is the same in all."""
    return [evolve(law, most=1) for law in contract.laws()]


@pytest.mark.parametrize("slot", TRIED)
@accelerator.apart
def test_what_conforms_on_a_cpu_conforms_there(slot: str) -> None:
    there = tried_on(accelerator.DEVICE, slot)
    found = [examine(there, law) for law in laws(there)]
    assert not [(each.law, each.why) for each in found if each.bad]
    assert any(each.status is Status.HOLDS for each in found)


@pytest.mark.parametrize("slot", TRIED)
@accelerator.apart
def test_what_makes_a_tensor_on_the_cpu_fails_there_and_there_alone(slot: str) -> None:
    here, there = (tried_on(device, slot) for device in ("cpu", accelerator.DEVICE))
    mutant = TRIED[slot].mutant
    broken = next((law for law in laws(there) if "cpu" in examine(there, law, mutant=mutant).why), None)
    assert broken is not None, "no law notices it"
    assert examine(here, broken, mutant=mutant).status is Status.HOLDS


@pytest.mark.soak
@pytest.mark.parametrize(
    "component",
    [f"{each.mark.slot}.{each.mark.use}" for each in Plugins.discover().registry if each.mark.slot in FOLLOWING],
)
def test_every_component_conforms_there(component: str) -> None:
    """In a process that may start others, as some laws do."""
    environment = os.environ | {"PYTHONPATH": str(Path(accelerator.__file__).parent)}
    done = subprocess.run(
        [sys.executable, __file__, component], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def main(component: str) -> int:
    """Try every law of a component there; print those that fail."""
    torch.set_num_threads(1)
    accelerator.set_up()
    report = run_checks(component, profile="ci", device=accelerator.DEVICE)
    for each in report.findings:
        if each.bad:
            print(each.law, each.why)
    return int(not report.conforms)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

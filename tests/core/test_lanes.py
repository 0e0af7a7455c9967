"""Phases that communicate run in a stream of their own: in the right order, and on memory that nothing else has."""

from collections.abc import Callable, Iterator
from unittest import mock

import accelerator
import pytest
import torch
from pipeline_at_work import PIPELINES, step

from tangram.core.lanes import Lanes
from tangram.testing.contracts.pipeline import on_one_rank

LAYERS = {"dualpipe": 2, "dualpipev": 4}
PLANS = {name: on_one_rank(PIPELINES[name].schedule(2, 4)) for name in LAYERS}
NO_ROUTING = "objectives.sequence_balance.weight=0"  # so that a stage ends with a phase that communicates


@pytest.mark.parametrize(("name", "overrides"), [("dualpipe", ()), ("dualpipev", (NO_ROUTING,))])
@accelerator.apart
def test_streams_run_pairs_as_if_there_were_one_stream(name: str, overrides: tuple[str, ...]) -> None:
    plan, layers = PLANS[name], LAYERS[name]
    with accelerator.timeline() as done:
        losses, load, gradients = step(plan, layers, *overrides, device=accelerator.DEVICE)
    assert done.faults == []
    assert len(done.clock(0)) == 2, "nothing ran beside what computes"
    expected = step(plan, layers, *overrides)
    assert losses == pytest.approx(expected[0], rel=1e-13)
    assert torch.equal(load.cpu(), expected[1])
    for address, gradient in expected[2].items():
        assert torch.allclose(gradients[address].cpu(), gradient, rtol=1e-12, atol=1e-14), address


def waits_for_nothing(lanes: Lanes, event: object) -> None:
    """A mutant: no phase waits for the one before it."""


def holds_nothing(lanes: Lanes, *values: object) -> None:
    """A mutant: memory is given away while another lane works on it."""


MUTANTS: dict[str, Callable] = {"waits for nothing": waits_for_nothing, "holds nothing": holds_nothing}


@pytest.mark.parametrize(
    ("method", "mutant", "fault"),
    [("_wait", "waits for nothing", "does not wait for"), ("hold", "holds nothing", "which none holds")],
)
@accelerator.apart
def test_what_real_streams_could_do_otherwise_is_seen(method: str, mutant: str, fault: str) -> None:
    with mock.patch.object(Lanes, method, MUTANTS[mutant]), accelerator.timeline() as done:
        step(PLANS["dualpipe"], LAYERS["dualpipe"], device=accelerator.DEVICE)
    assert any(fault in each for each in done.faults)


@accelerator.apart
def test_what_communicates_waits_for_its_own_work_and_what_comes_after_for_all() -> None:
    stream = accelerator.MODULE.current_stream
    with accelerator.timeline() as done:
        x = torch.zeros(4, device=accelerator.DEVICE)
        lanes, clocks = Lanes(torch.device(accelerator.DEVICE)), {}

        def sends() -> Iterator[str]:
            yield "compute"
            y = x + 1
            clocks["computed"] = done.clock(stream().stream_id)
            yield "comm"
            lanes.hold(y)
            y.mul_(2)
            clocks["sent"] = done.clock(aside := stream().stream_id)
            assert aside != 0
            yield "comm"
            y.mul_(2)
            clocks["gone"] = done.clock(aside)

        def computes() -> Iterator[str]:
            for _ in range(3):
                yield "compute"
                x * 2

        lanes.side_by_side(sends(), computes())
        clocks["after"] = done.clock(0)
    assert done.faults == []
    assert clocks["sent"][0] == clocks["computed"][0], "the other work's operations were waited for"
    assert clocks["after"].items() >= {stream: at for stream, at in clocks["gone"].items() if stream}.items()
    assert clocks["after"][0] > clocks["sent"][0]

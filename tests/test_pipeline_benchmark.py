"""The benchmark of pipelines tells costs apart, and sets steps beside the right simulation."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tangram.core.plan import Op, Plan, validate
from tangram.core.simulator import Costs, simulate

FILE = Path(__file__).parents[1] / "benchmarks" / "pipeline.py"
COSTS = Costs(forward=3.0, input=2.0, weight=1.0, overlap=5.5)
COUNT = 4


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_of_pipelines", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_a_stage_costs_is_told_apart(script):
    taken = {}
    for name, order in script.orders(COUNT).items():
        validate(Plan(3, (COUNT,), {(0, stage): 0 for stage in range(3)}, (tuple(order),)))
        inner = [action for action in order if action.slot.stage == 1]
        taken[name] = {
            "all": sum(COSTS.of(action) for action in inner) / COUNT,
            "forward": sum(COSTS.forward for action in inner if action.op is Op.FORWARD) / COUNT,
            "weight": sum(COSTS.weight for action in inner if action.op is Op.WEIGHT_BACKWARD) / COUNT,
        }
    found = script._told_apart(taken, COUNT)
    assert found == pytest.approx({"F": 3.0, "I": 2.0, "W": 1.0, "B": 3.0, "F&B": 5.5})


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_that_takes_what_was_simulated_is_shown_as_such(script, ranks, monkeypatch):
    monkeypatch.setattr(script.os, "cpu_count", lambda: ranks)
    took = [{} for _ in range(ranks)]
    for name in script.SCHEDULES:
        plan = script.pipeline_of(name).schedule(ranks, script.MICROBATCHES)
        layers = script.LAYERS // plan.stages
        kinds = {kind: getattr(COSTS, kind) * layers for kind in ("forward", "input", "weight", "overlap")}
        timeline = simulate(plan, Costs(**kinds))
        for rank, bubble in enumerate(timeline.bubble):
            took[rank][name] = [script.Took(0.0, timeline.makespan, timeline.makespan - bubble, 0.0, 0.0)]
    of_a_stage = {kind: script.BLOCKS * getattr(COSTS, kind) for kind in ("forward", "input", "weight", "overlap")}
    header, _, *rows = script.steps_table(ranks, took, Costs(**of_a_stage)).splitlines()
    place = [column.strip() for column in header.split("|")].index("over that")
    assert len(rows) == len(script.SCHEDULES)
    for row in rows:
        columns = [column.strip() for column in row.split("|")]
        assert columns[place] == "1.00 (1.00 to 1.00)", row
        assert columns[place + 2].startswith(f"{columns[place + 1]} "), row

"""The JSON schema of presets: it takes what is shipped and refuses what a preset cannot hold."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tangram.core.config import load
from tangram.core.plugins import Plugins
from tangram.core.preset_schema import preset_schema
from tangram.core.presets import available, dump, load_preset

PLUGINS = Plugins.discover()
SHIPPED = available(PLUGINS)
FILE = Path(__file__).parents[2] / "presets" / "schema.json"
VALIDATOR = Draft202012Validator(preset_schema(PLUGINS.registry))


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(preset_schema(PLUGINS.registry))


def test_the_committed_schema_is_what_is_generated() -> None:
    generated = preset_schema(PLUGINS.registry)
    assert json.loads(FILE.read_text()) == generated, "stale: run `tangram schema > presets/schema.json`"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_names_the_schema_and_is_valid_as_written_and_as_resolved(name: str) -> None:
    assert SHIPPED[name].read_text().splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    VALIDATOR.validate(load(SHIPPED[name]).plain())
    VALIDATOR.validate(dump(load_preset(name)))


V3: dict[str, Any] = load(SHIPPED["deepseek-v3"]).plain()  # type: ignore[assignment]
MOE = ("model", "block", "feedforward")
MUTANTS: list[tuple[tuple[str, ...], object]] = [
    (("modle",), {}),
    (("model", "dimm"), 3),
    (("model", "dim"), "wide"),
    (("model", "dim"), 2.5),
    (("model", "dim"), True),
    (("model", "dim"), 0),
    (("model", "recompute"), "some"),
    (("model", "block", "attention", "use"), "mlaa"),
    (("model", "block", "attention", "n_kv_heads"), 2),
    ((*MOE, "router", "score"), "tanh"),
    ((*MOE, "router", "use"), 3),
    ((*MOE, "balancer", "speed"), "fast"),
    ((*MOE, "balancer", "speed"), []),
    ((*MOE, "balancer", "speed"), [{"until": 1, "valeu": 0.1}]),
    ((*MOE, "balancer", "speed"), [{"from": 1, "to": 2, "shape": "linear"}]),
    ((*MOE, "balancer", "speed"), [{"until": 1, "until_step": 1, "value": 2}]),
    (("model", "blocks"), 3),
    (("model", "blocks"), [{"repeat": "many"}]),
    (("objectives", "mtp", "dept"), 1),
    (("objectives", "mine"), {"use": "no_such"}),
    (("objectives", "mtp"), 7),
    (("optimizer", "betas"), [0.9]),
    (("train", "lr"), True),
    (("extends",), 3),
]


@pytest.mark.parametrize(("path", "value"), MUTANTS)
def test_a_preset_with_a_mistake_is_refused(path: tuple[str, ...], value: object) -> None:
    VALIDATOR.validate(V3)
    mutant = copy.deepcopy(V3)
    place = mutant
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not VALIDATOR.is_valid(mutant)


PATCHES = [
    {"extends": "v3-tiny"},
    {"extends": ["v3-tiny", "./mine.yaml"], "objectives": {"mtp": None}},
    {"model": {"block": {"feedforward": {"balancer": {"speed": 0.01}}}}},
    {"model": {"blocks": {"0": {"repeat": 2}}}},
    {"model": {"block": {"attention": {"q_rank": None}}}},
    {"objectives": {"second": {"use": "mtp", "depth": 2}, "mtp": {"weight": None}}},
    {"train": {"tokens": 14.8e12, "lr": [{"until_step": 2000, "from": 0, "to": 1, "shape": "linear"}, {"value": 1}]}},
    {"observers": {}},
]


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_on_another_preset_is_valid(patch: dict[str, object]) -> None:
    VALIDATOR.validate(patch)


def test_every_property_says_what_it_means() -> None:
    schema: Any = preset_schema(PLUGINS.registry)
    configs = [schema, *(d for d in schema["$defs"].values() if "properties" in d)]
    assert len(configs) > 20
    for config in configs:
        for key, value in config["properties"].items():
            assert key == "use" or value["description"], key

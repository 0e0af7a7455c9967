"""The benchmark of operations: what is wrong has no figure, and nothing that has a kernel is left out."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peer  # noqa: F401  first: transformers must not take a file named kernels for a library of that name
import pytest
import torch

import tangram.kernels

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(FOLDER))

from operations import cases, names  # noqa: E402
from operations.case import Case, Peer, near  # noqa: E402
from operations.clock import Ceilings  # noqa: E402
from operations.row import Row, measured  # noqa: E402
from operations.scale import SMALL, V3  # noqa: E402

TOY = replace(
    SMALL,
    dtype=torch.float32,
    rows=128,
    linears=((264, 256),),
    experts=2,
    expert_linears=((128, 256),),
    tokens=128,
    dim=256,
    hidden=128,
    heads=2,
    routed=8,
    top_k=2,
    vocabulary=512,
    matrix=(64, 40),
    decode_heads=(4,),
    sequences=2,
    context=128,
    latent=64,
)


class Counter:
    """A clock that says one second, and remembers what it timed."""

    said = "not at all"

    def __init__(self) -> None:
        self.timed: list[str] = []

    def seconds(self, sides):
        self.timed += sides
        return dict.fromkeys(sides, 1.0)


def doubled(ours=lambda x: 2 * x, **peers) -> Case:
    return Case(
        operation="doubled",
        shape="9",
        inputs=(torch.randn(9),),
        ours=ours,
        formula=lambda x: x + x,
        check=near(1),
        peers={name: Peer(make) for name, make in peers.items()},
    )


def row(case: Case, clock: Counter) -> Row:
    return measured("table", case, clock, Ceilings(1.0, 1.0), "not asked for")


def refuse(x):
    raise RuntimeError("no such device")


@pytest.mark.parametrize("ours", [lambda x: 2 * x + 1e-3, lambda x: x * float("nan"), lambda x: x[:8] * 2, refuse])
def test_what_is_wrong_is_not_timed(ours):
    clock = Counter()
    assert row(doubled(ours), clock).fault
    assert not clock.timed


def test_a_peer_is_timed_if_it_gives_the_same():
    def absent():
        import no_such_package  # noqa: F401

    found = row(
        doubled(
            there=lambda: lambda x: 2.01 * x,
            absent=absent,
            refuses=lambda: refuse,
            other=lambda: lambda x: 2.5 * x,
            misshapen=lambda: lambda x: x[:, None] * 2,
            nothing=lambda: lambda x: x * float("nan"),
        ),
        Counter(),
    )
    assert found.fault is None
    assert found.peers == {
        "torch eager": 1.0,
        "torch.compile": "not asked for",
        "there": 1.0,
        "absent": "absent",
        "refuses": "unsupported",
        "other": "differs",
        "misshapen": "differs",
        "nothing": "differs",
    }
    assert found.moved == 2 * 9 * 4


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", FOLDER / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_operation_withholds_its_figure_and_fails_the_command(script, wrong, tmp_path, monkeypatch, capsys):
    drawn = [doubled(), doubled(lambda x: 3 * x)] if wrong else [doubled()]
    monkeypatch.setattr(script, "cases", lambda scale, only: [("table", case) for case in drawn])
    monkeypatch.setattr(script, "ceilings", lambda *_: Ceilings(1e9, 1e9))
    monkeypatch.setattr(script, "CPUClock", lambda budget: Counter())
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--no-compile", "--out", str(tmp_path)])
    monkeypatch.setattr(script, "settle", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda flush: None)
    if wrong:
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == 1
    else:
        script.main()
    table = [line for line in (tmp_path / "kernels.md").read_text().splitlines() if line.startswith("| doubled")]
    assert [line.split(" | ")[2] for line in table] == ["1e+03", *(["WRONG"] if wrong else [])]
    assert ("WRONG" in capsys.readouterr().out) == wrong
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [one["seconds"] for one in rows] == [1.0, 0.0][: len(drawn)]


def test_every_case_is_right_at_a_toy_size():
    clock = Counter()
    found = [row(case, clock) for _, case in cases(TOY, "")]
    assert [(one.operation, one.fault) for one in found if one.fault] == []
    assert [one.operation for one in found] == names(TOY)
    assert all(one.peers["torch eager"] == 1.0 for one in found)


@pytest.mark.parametrize("scale", [SMALL, V3])
def test_every_operation_with_a_kernel_has_a_case(scale):
    measured_ones = {name.split(",")[0] for name in names(scale)}
    for module in Path(tangram.kernels.__file__).parent.glob("*.py"):
        text = module.read_text()
        if "@torch.library.custom_op" in text:
            assert any(f"\ndef {name}(" in text for name in measured_ones), module.name


def test_without_a_gpu_the_training_benchmark_says_so_in_a_line():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, FOLDER / "train_gpu.py"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "needs a GPU" in done.stderr

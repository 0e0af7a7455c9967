"""Checkpoints written beside training: what stood at the call is written, one at a time, and no error is lost."""

import threading
from pathlib import Path

import pytest
import torch

from tangram.core import checkpoint
from tangram.core.checkpoint import CheckpointError
from tangram.core.saver import Saver


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold every write until it is set."""
    opened, save = threading.Event(), checkpoint.save

    def held(*arguments: object, **named: object) -> Path:
        assert opened.wait(30)
        return save(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save", held)
    return opened


def test_what_stood_at_the_call_is_written_whatever_training_does_meanwhile(tmp_path: Path, gate: threading.Event):
    weights, saver = torch.zeros(4), Saver(tmp_path, keep_last=9, keep_every=0)
    assert saver.submit(1, {"model": {"a": weights, "n": 3}}, {"progress": 1}) == []
    assert saver.sealed() == []
    weights += 1
    gate.set()
    assert saver.wait() == [tmp_path / "step-1"]
    assert saver.wait() == saver.sealed() == []
    assert torch.equal(checkpoint.read_file(tmp_path / "step-1", "model")["a"], torch.zeros(4))
    saver.close()


def test_the_next_one_waits_for_the_one_before_and_tells_it(tmp_path: Path, gate: threading.Event):
    saver = Saver(tmp_path, keep_last=1, keep_every=0)
    saver.submit(1, {"model": {"a": torch.zeros(4)}}, {})
    gate.set()
    assert saver.submit(2, {"model": {"a": torch.ones(4)}}, {}) == [tmp_path / "step-1"]
    saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]  # the older one went after it
    assert saver.wait() == [tmp_path / "step-2"]
    cost = saver.cost(seconds=10.0)
    assert cost.checkpoints == 2
    assert cost.share == cost.held_up / 10
    assert cost.held_up > 0
    assert cost.writing > 0


@pytest.mark.parametrize("next_call", ["submit", "sealed", "wait"])
def test_a_write_that_failed_is_heard_of_at_the_next_call(tmp_path: Path, next_call: str):
    (tmp_path / "file").write_text("not a folder")
    saver = Saver(tmp_path / "file", keep_last=1, keep_every=0)
    saver.submit(1, {"model": {}}, {})
    saver.close()
    calls = {"submit": lambda: saver.submit(2, {}, {}), "sealed": saver.sealed, "wait": saver.wait}
    with pytest.raises(CheckpointError, match="step-1 could not be written"):
        calls[next_call]()

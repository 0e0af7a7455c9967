"""SIGTERM and Ctrl-C: the step is finished and saved, exit 75; a second Ctrl-C ends at once."""

from pathlib import Path

import pytest
from whole_runs import essence, trained, write_preset

from tangram.core import checkpoint

STEPS = 8


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset") / "short.yaml", f"train.tokens={STEPS * 48}")


@pytest.fixture(scope="module")
def whole(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, said = trained(preset, out)
    assert code == 0, said
    return essence(out, STEPS)


@pytest.mark.parametrize(("fate", "name"), [("term:3", "SIGTERM"), ("int:3", "SIGINT")])
def test_asked_to_stop_a_run_saves_and_goes_on_as_if_nothing_was(
    fate: str, name: str, preset: Path, whole: dict[str, object], tmp_path: Path
) -> None:
    code, said = trained(preset, tmp_path / "run", ends=fate)
    assert code == 75, said
    assert f"stopped by {name} after step 3, now saved; --resume goes on" in said
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-3"]
    code, said = trained(preset, tmp_path / "run", "--resume")
    assert code == 0, said
    assert f"resuming from {tmp_path / 'run/checkpoints/step-3'}, the newest checkpoint that is whole" in said
    assert essence(tmp_path / "run", STEPS) == whole


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing(preset: Path, tmp_path: Path) -> None:
    code, said = trained(preset, tmp_path / "run", ends="twice:3")
    assert code == 130, said
    assert "SIGINT: finishing the step and saving; Ctrl-C ends at once" in said
    assert checkpoint.newest(tmp_path / "run/checkpoints") is None


def test_resuming_says_what_it_passed_over_and_why(preset: Path, tmp_path: Path) -> None:
    saving = ("train.checkpoint_every=2",)
    assert trained(preset, tmp_path / "run", *saving)[0] == 0
    damaged = tmp_path / "run/checkpoints/step-8/model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    code, said = trained(preset, tmp_path / "run", *saving, "--resume")
    assert code == 0, said
    assert "resuming from" in said
    assert "step-6, the newest checkpoint that is whole" in said
    assert "passed over" in said
    assert "step-8/model.safetensors: differs from its manifest" in said

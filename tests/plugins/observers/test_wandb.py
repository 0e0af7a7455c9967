"""Weights & Biases is chosen by what is there, and whatever it does, training goes on and says it once."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny

from tangram.core import load_run
from tangram.core.plugins import run_manager
from tangram.core.records import GradientNorm, Progress, Result, StepReport, Verdict
from tangram.core.run import train
from tangram.core.session import RunView
from tangram.plugins.observers import wandb as observer
from tangram.plugins.observers.wandb import WandbConfig, chosen_mode, has_key

wandb = pytest.importorskip("wandb")

SHORT = ("train.tokens=240", "observers.ema=null")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take away what this machine's user may have set."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))


def report(step: int) -> StepReport:
    result = Result({"next_token": 2.0}, 2.0, torch.zeros(1, 1), 1)
    return StepReport(Progress(step - 1), Progress(step, 48), 0.1, result, GradientNorm(1.0), Verdict.ACCEPT)


def lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("wandb:")]


class Inits:
    """Stands for `wandb.init`: notes what it is given; fails in the modes named, and at every log if told so."""

    def __init__(self, failing: tuple[str, ...] = (), error: Exception | None = None, log_fails: bool = False) -> None:
        self.failing, self.error, self.log_fails = failing, error or RuntimeError("no server\nmore"), log_fails
        self.modes: list[str] = []
        self.ids: list[str] = []
        self.rows: list[dict[str, object]] = []
        self.ended: list[int] = []
        self.tried = 0

    def __call__(self, *, mode: str, id: str, dir: Path, **_: object) -> SimpleNamespace:
        self.modes.append(mode)
        self.ids.append(id)
        if mode in self.failing:
            raise self.error
        folder = str(dir / "wandb" / "run" / "files")
        return SimpleNamespace(
            log=self.log,
            define_metric=lambda *_, **__: None,
            finish=lambda exit_code: self.ended.append(exit_code),
            dir=folder,
            url="https://example.org/run",
        )

    def log(self, row: dict[str, object]) -> None:
        self.tried += 1
        if self.log_fails:
            raise OSError("broken pipe")
        self.rows.append(row)


def watched(directory: Path, config: WandbConfig, steps: int = 5, error: Exception | None = None) -> None:
    hook = run_manager({"wandb": config.build()}).hook
    run = RunView(tiny(), directory, Progress(), {}, 0)
    hook.tangram_run_started(run=run)
    for step in range(1, steps + 1):
        hook.tangram_step_ended(run=run, report=report(step))
    hook.tangram_run_ended(run=run, error=error)


def test_without_a_key_a_run_is_kept_offline_in_its_directory_and_says_how_to_send_it(tmp_path, capsys):
    train(tiny(*SHORT, "observers.wandb={}"), tmp_path / "run")
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("run-*.wandb"))
    (line,) = lines(capsys.readouterr().out)
    assert line == f"wandb: offline (no API key); later: wandb sync {offline}"
    train(tiny(*SHORT), tmp_path / "unwatched")
    states = [load_run(tmp_path / name).model.state_dict() for name in ("run", "unwatched")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_where_wandb_cannot_begin_training_goes_on_and_says_so_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wandb, "init", Inits(failing=("online", "offline")))
    train(tiny(*SHORT, "observers.wandb={}"), tmp_path / "run")
    assert lines(capsys.readouterr().out) == [
        "wandb: off for the rest of this run (no server); metrics.jsonl is the record"
    ]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_server_that_does_not_answer_leaves_the_run_offline(tmp_path, capsys, monkeypatch):
    inits = Inits(failing=("online",))
    monkeypatch.setattr(wandb, "init", inits)
    watched(tmp_path, WandbConfig(mode="online"))
    assert inits.modes == ["online", "offline"]
    assert [row["step"] for row in inits.rows] == [1, 2, 3, 4, 5]
    (line,) = lines(capsys.readouterr().out)
    assert line.startswith("wandb: offline (no server); later: wandb sync ")


def test_a_server_that_is_not_there_leaves_the_run_of_the_real_library_offline(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(observer, "_INIT_TIMEOUT", 1.0)
    train(tiny(*SHORT, "observers.wandb={}"), tmp_path / "run")
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("run-*.wandb"))
    last = lines(capsys.readouterr().out)[-1]
    assert last.startswith("wandb: offline (")
    assert last.endswith(f"; later: wandb sync {offline}")


def test_after_three_errors_nothing_more_is_tried(tmp_path, capsys, monkeypatch):
    inits = Inits(log_fails=True)
    monkeypatch.setattr(wandb, "init", inits)
    watched(tmp_path, WandbConfig(mode="offline"), steps=9)
    assert inits.tried == 3
    assert len(lines(capsys.readouterr().out)) == 2  # where it is kept, and that it is off


def test_a_library_that_is_not_there_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    watched(tmp_path, WandbConfig(mode="online"))
    (line,) = lines(capsys.readouterr().out)
    assert "pip install 'tangram-lm[wandb]'" in line


def test_a_directory_keeps_its_run_and_another_has_another(tmp_path, monkeypatch):
    inits = Inits()
    monkeypatch.setattr(wandb, "init", inits)
    for directory in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        watched(directory, WandbConfig(mode="offline"))
    assert inits.ids[0] == inits.ids[1] != inits.ids[2]


def test_it_is_told_how_the_run_ended(tmp_path, monkeypatch):
    inits = Inits()
    monkeypatch.setattr(wandb, "init", inits)
    watched(tmp_path, WandbConfig(mode="offline"))
    watched(tmp_path, WandbConfig(mode="offline"), error=RuntimeError("stopped"))
    assert inits.ended == [0, 1]


def test_disabled_imports_and_writes_nothing(tmp_path, capsys, monkeypatch):
    inits = Inits()
    monkeypatch.setattr(wandb, "init", inits)
    watched(tmp_path, WandbConfig(mode="disabled"))
    assert not inits.modes
    assert not lines(capsys.readouterr().out)


@pytest.mark.parametrize("asked", ["online", "offline", "disabled"])
@pytest.mark.parametrize("preset", ["auto", "online", "offline", "disabled"])
@pytest.mark.parametrize("key", [True, False])
def test_the_environment_wins_then_the_preset_then_whether_there_is_a_key(asked, preset, key, monkeypatch):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    by_key = "online" if key else "offline"
    assert chosen_mode(WandbConfig(mode=preset))[0] == (by_key if preset == "auto" else preset)
    monkeypatch.setenv("WANDB_MODE", asked)
    assert chosen_mode(WandbConfig(mode=preset))[0] == asked


def test_a_key_is_found_in_netrc_for_the_server_that_is_asked(tmp_path, monkeypatch):
    assert not has_key()
    netrc = tmp_path / "netrc"
    for host in ("api.wandb.ai", "api.forge.coreweave.com"):
        netrc.write_text(f"machine {host} login user password secret\n")
        assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()
    netrc.write_text("this is no netrc\n")
    assert not has_key()


@pytest.mark.parametrize("wrong", [{"project": ""}, {"mode": "on"}])
def test_a_setting_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WandbConfig(**wrong)

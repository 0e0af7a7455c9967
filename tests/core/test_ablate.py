"""The command `ablate`: what it says before, during and after, and how it exits."""

import json
from pathlib import Path

import pytest
from toy_study import NURSERY, write

from tangram.core.cli import main


class Shell:
    """Runs commands in this process; the workers of studies are forks of it."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        out, err = self.capfd.readouterr()
        return int(exited.value.code or 0), out, err


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capfd)


ABLATE = ("ablate", "study.yaml", "--plugin", NURSERY)
ONE = {"seeds: 3": "seeds: 1"}


def test_a_study_ends_in_a_table_of_verdicts_and_reports(shell: Shell, tmp_path: Path) -> None:
    write(tmp_path, preset={"tokens: 48": "tokens: 16"})
    code, out, err = shell(*ABLATE)
    assert code == 0, err
    assert out.index("model.block.feedforward.hidden") < out.index("Verdict: loss.next_token")
    assert "6/6 done" in err
    study = tmp_path / "studies/toy"
    for name in ("report.html", "report.md", "report.tex", "results.csv", "results.json", "study.yaml"):
        assert (study / name).stat().st_size, name
    found = json.loads((study / "results.json").read_text())
    wide = found["metrics"]["loss.next_token"]["variants"][1]
    assert (wide["variant"], wide["difference"]["n"]) == ("wide", 3)
    assert wide["finding"] in ("better", "worse", "within noise", "inconclusive")
    written = {name: (study / name).read_bytes() for name in ("report.html", "report.md", "report.tex")}
    for name in written:
        (study / name).unlink()
    code, out, _ = shell("report", study)  # from the directory alone: no plugin is named
    assert (code, out.strip()) == (0, str(study / "report.html"))
    assert {name: (study / name).read_bytes() for name in written} == written


def test_a_dry_run_says_what_it_would_cost_and_trains_nothing(shell: Shell, tmp_path: Path) -> None:
    write(tmp_path)
    code, out, _ = shell(*ABLATE, "--dry-run")
    assert code == 0
    assert "minutes with 2 cells at once, from a trial of a few steps of each variant" in out
    assert not (tmp_path / "studies").exists()
    code, out, _ = shell(*ABLATE, "--dry-run", "--json")
    told = json.loads(out)
    assert [row["variant"] for row in told["variants"]] == ["base", "wide"]
    assert [(row["cells"], row["tokens"]) for row in told["variants"]] == [(3, 48), (3, 48)]
    cost = [row["seconds"] for row in told["variants"]]
    assert told["seconds"] == pytest.approx(3 * sum(cost) / 2)


FAILS = '''
from attrs import frozen
from tangram.core import component
from tangram.core.hookspecs import HOOKIMPL

@component("observer", use="fails")
@frozen(kw_only=True)
class FailsConfig:
    """Fails in every run of a wide model."""

    def build(self):
        return Fails()

class Fails:
    @HOOKIMPL
    def tangram_step_ended(self, run):
        if run.experiment.model.blocks[0].feedforward.hidden == 16:
            raise OSError("the disk is full")
'''


def test_a_cell_that_fails_is_listed_and_stops_no_other(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    write(tmp_path, ONE, {"doom: {use: doom}": "fails: {}"})
    code, _, err = shell(*ABLATE, "--plugin", "fails.py")
    assert code == 1
    assert "wide, seed 0: failed (OSError: the disk is full)" in err
    report = (tmp_path / "studies/toy/report.md").read_text()
    assert "| wide | 0 | failed | OSError: the disk is full |" in report
    found = json.loads((tmp_path / "studies/toy/results.json").read_text())
    assert [cell["state"] for cell in found["cells"]] == ["done", "failed"]
    assert found["metrics"]["loss.next_token"]["variants"][1]["values"] == {}


def test_a_worker_that_is_killed_is_listed_and_its_cell_goes_on_next_time(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ONE)
    monkeypatch.setenv("TANGRAM_DOOM", f"one:3:{tmp_path / 'steps'}")
    code, _, err = shell(*ABLATE)
    assert code == 1
    assert "failed (killed by signal 9; see studies/toy/logs/" in err
    monkeypatch.setenv("TANGRAM_DOOM", "")
    code, _, err = shell(*ABLATE)
    assert code == 0
    assert "1 of 2 cells are done already" in err
    code, _, err = shell(*ABLATE)
    assert (code, "2 of 2 cells are done already" in err) == (0, True)


def test_a_mistake_in_the_study_is_a_line_and_exit_code_2(shell: Shell, tmp_path: Path) -> None:
    write(tmp_path, {"hidden: 16": "hidden: 8"})
    code, _, err = shell(*ABLATE)
    assert code == 2
    assert err.startswith("study.yaml:6: axes: the variants 'base' and 'wide'")
    code, _, err = shell("ablate", "nothing.yaml")
    assert (code, "nothing.yaml: cannot be read" in err) == (2, True)


def test_what_cannot_be_built_is_told_with_its_line_and_variant(shell: Shell, tmp_path: Path) -> None:
    patch = "{model: {block: {attention: {head_dim: 5}}}}"
    write(tmp_path, {"{model: {block: {feedforward: {hidden: 16}}}}": patch})
    code, _, err = shell(*ABLATE)
    assert code == 2
    assert err.startswith("study.yaml:6: model.block")
    assert "(in variant 'wide')" in err


def test_a_directory_that_is_no_study_is_told(shell: Shell, tmp_path: Path) -> None:
    code, _, err = shell("report", tmp_path)
    assert (code, "no run directory" in err) == (2, True)

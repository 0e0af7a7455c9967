"""A run may name files of code; nothing that reads a run imports one that the user has not given."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from tiny import SMALL

from tangram.core import load_preset, load_run, train
from tangram.core.cli import main
from tangram.core.presets import ForeignCodeError
from tangram.core.provenance import recorded_files
from tangram.core.reports import read_run

PLUGIN = """
from pathlib import Path
from attrs import frozen
from tangram.core import component
from tangram.plugins.training.guards import RaiseConfig

CANARY = Path(__file__).with_name("canary")
CANARY.write_text(f"{len(CANARY.read_text()) + 1 if CANARY.exists() else 1}")


@component("guard", use="strict")
@frozen(kw_only=True)
class Strict(RaiseConfig):
    '''Stop the run before the update.'''
"""

DIGEST = sha256(PLUGIN.encode()).hexdigest()

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(exited.value.code or 0), out, err

    return call


SHORT = (*SMALL, "train.tokens=48", "objectives.mtp=null")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs whose guard comes from a file: their preset names it, or the command line did."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "strict.py").write_text(PLUGIN)
    (folder / "mine.yaml").write_text("extends: v3-tiny\nplugins: [strict.py]\nguard: {use: strict}\n")
    train(load_preset(folder / "mine.yaml", *SHORT), folder / "preset")
    option = load_preset("v3-tiny", *SHORT, "guard=null", "guard.use=strict", plugins=[folder / "strict.py"])
    train(option, folder / "option")
    return folder


@pytest.fixture
def folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder as it was, in a process that has not imported the file."""
    monkeypatch.chdir(trained)
    before = {path for path in trained.rglob("*") if "canary" not in path.name}
    forget(trained)
    yield trained
    (trained / "strict.py").write_text(PLUGIN)
    for path in sorted(set(trained.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def forget(folder: Path) -> None:
    """Make this process one that has not imported the plugin."""
    for name in [name for name in sys.modules if name.startswith("tangram_file_")]:
        del sys.modules[name]
    (folder / "canary").unlink(missing_ok=True)


READERS = {
    "evaluate": ["evaluate", "RUN"],
    "report": ["report", "RUN"],
    "export": ["export", "RUN", "exported"],
    "resume": ["train", "RUN/experiment.yaml", "--out", "RUN", "--resume"],
    "show": ["show", "RUN/experiment.yaml"],
    "check": ["check", "RUN/experiment.yaml"],
    "describe": ["describe", "RUN/experiment.yaml"],
    "diff": ["diff", "v3-tiny", "RUN/experiment.yaml"],
    "copy": ["copy", "RUN/experiment.yaml", "copied.yaml"],
}


@pytest.mark.parametrize("run", ["preset", "option"])
def test_no_command_imports_what_a_run_names(run: str, folder: Path, shell: Shell) -> None:
    for command in READERS.values():
        code, _, err = shell(*(word.replace("RUN", run) for word in command))
        assert (code, "Traceback" in err) == (2, False), (command, err)
        assert f"strict.py (sha256 {DIGEST})" in err, command
        assert "--plugin strict.py" in err, command
        assert not (folder / "canary").exists(), command
    for read in (load_run, read_run):
        with pytest.raises(ForeignCodeError, match=r"strict\.py"):
            read(run)
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("run", ["preset", "option"])
@pytest.mark.parametrize("name", ["evaluate", "export", "show"])
def test_a_command_takes_the_file_from_the_user(name: str, run: str, folder: Path, shell: Shell) -> None:
    code, _, err = shell(*(word.replace("RUN", run) for word in READERS[name]), "--plugin", "strict.py")
    assert (code, err) == ((2, f"{run} was trained on data without held-out text\n") if name == "evaluate" else (0, ""))
    assert (folder / "canary").exists()


def test_a_preset_that_the_user_names_is_the_users_word_but_not_what_it_extends(folder: Path, shell: Shell) -> None:
    (folder / "child.yaml").write_text("extends: preset/experiment.yaml\n")
    assert shell("show", "child.yaml")[0] == 2
    assert not (folder / "canary").exists()
    assert shell("show", "child.yaml", "--plugin", "strict.py")[0] == 0
    forget(folder)
    assert shell("show", "mine.yaml")[0] == 0
    assert (folder / "canary").exists()


def test_what_a_run_extends_is_the_runs_word_too(folder: Path, shell: Shell) -> None:
    (folder / "experiment.yaml").write_text("extends: ./mine.yaml\n")
    code, _, err = shell("show", "./experiment.yaml")
    assert code == 2
    assert "mine.yaml:2: plugins: strict.py" in err
    assert not (folder / "canary").exists()


def test_a_run_records_the_files_it_used(trained: Path) -> None:
    assert recorded_files(trained / "preset") == recorded_files(trained / "option") == {f"{trained}/strict.py": DIGEST}


@pytest.mark.parametrize("about", ["", "[]", '{"plugins": 3}', "{}", "\xff"])
def test_a_damaged_record_is_none(about: str, tmp_path: Path) -> None:
    (tmp_path / "about.json").write_bytes(about.encode("latin-1"))
    assert recorded_files(tmp_path) == {}


def test_a_file_that_has_changed_is_told(folder: Path, shell: Shell) -> None:
    (folder / "strict.py").write_text(PLUGIN + "\nX = 1\n")
    now = sha256((folder / "strict.py").read_bytes()).hexdigest()
    code, _, err = shell("evaluate", "preset")
    assert code == 2
    assert f"sha256 {now}, when the run began {DIGEST}" in err
    told = f"strict.py, a plugin file: sha256 {DIGEST} when the run began, {now} now"
    assert f"warning: {told}" in shell("export", "preset", "exported", "--plugin", "strict.py")[2]
    code, _, err = shell(*(word.replace("RUN", "preset") for word in READERS["resume"]), "--plugin", "strict.py")
    assert (code, f"warning: {told}" in err) == (0, True)
    assert any(told in gap for gap in read_run("preset", ["strict.py"]).gaps)


def test_a_file_that_was_moved_is_known_by_its_content_or_its_name(folder: Path) -> None:
    (folder / "below").mkdir()
    shutil.copy("strict.py", "renamed.py")
    Path("below/strict.py").write_text(PLUGIN + "\n")
    Path("strict.py").unlink()
    Path("other.py").write_text("")
    with pytest.raises(ForeignCodeError, match="of a file that is not there, when the run began"):
        load_run("preset", plugins=["other.py"])
    assert load_run("preset", plugins=["renamed.py"]).progress.step == 1
    with pytest.warns(match="a plugin file: sha256"):
        load_run("preset", plugins=["below/strict.py"])
    assert Path("canary").exists() and Path("below/canary").exists()


def test_a_run_without_files_of_code_records_none(tmp_path: Path) -> None:
    train(load_preset("v3-tiny", *SHORT), tmp_path / "run")
    assert json.loads((tmp_path / "run/about.json").read_text())["plugins"] == {}

"""`tangram new-plugin`: for every slot a package whose tests pass at once, that trains, and whose study can be run."""

import math
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tiny import SMALL

from tangram.core import train
from tangram.core.cli import main
from tangram.core.contracts import SLOTS
from tangram.core.plugins import Plugins
from tangram.core.presets import resolve, to_yaml
from tangram.core.scaffold import STARTERS, ScaffoldError, write_package
from tangram.core.study import read_study

PRESET_SLOTS = sorted(SLOTS.keys() - {"launcher"})


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, plugins = tmp_path_factory.mktemp("packages"), Plugins.discover()
    for slot in PRESET_SLOTS:
        write_package(f"acme-{slot}", slot, folder / f"acme-{slot}", plugins)
    return folder


@pytest.fixture(scope="module")
def plugins(packages: Path) -> Plugins:
    return Plugins.discover(sorted(packages.glob("*/acme_*.py")))


def test_every_slot_of_a_preset_has_a_package_to_start_from() -> None:
    assert sorted(STARTERS) == PRESET_SLOTS


def test_the_tests_of_every_package_pass_at_once(packages: Path, tmp_path: Path) -> None:
    path = os.pathsep.join(str(packages / f"acme-{slot}") for slot in PRESET_SLOTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=junit.xml", str(packages)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    cases = list(ElementTree.parse(tmp_path / "junit.xml").iter("testcase"))
    passed = Counter(case.get("classname", "").rpartition(".")[2] for case in cases if len(case) == 0)
    assert set(passed) == {f"TestAcme{slot.capitalize()}" for slot in PRESET_SLOTS}
    assert min(passed.values()) >= 3, passed


def test_what_is_written_is_clean_and_installs_as_a_plugin(packages: Path) -> None:
    root = Path(__file__).parents[2]
    ruff = [Path(sys.executable).with_name("ruff"), "--config", root / "pyproject.toml"]
    for check in (["check", "--extend-per-file-ignores", "test_*.py:D"], ["format", "--check"]):
        done = subprocess.run([ruff[0], *check, *ruff[1:], packages], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    for slot in PRESET_SLOTS:
        project = tomllib.loads((packages / f"acme-{slot}/pyproject.toml").read_text())
        assert project["project"]["entry-points"] == {"tangram": {f"acme-{slot}": f"acme_{slot}"}}
        assert (packages / f"acme-{slot}/acme_{slot}.py").exists()


def test_every_component_is_documented_and_has_its_slot(packages: Path, plugins: Plugins) -> None:
    for slot in PRESET_SLOTS:
        entry = plugins.registry.get(slot, f"acme_{slot}")
        assert entry is not None
        assert entry.config.__name__ == f"Acme{slot.capitalize()}Config"
    assert not [remark for remark in plugins.remarks if "acme" in remark.name], plugins.remarks


def preset_of(packages: Path, slot: str) -> Path:
    """Write the preset that a package's README shows beside its module, and return it."""
    text = (packages / f"acme-{slot}/README.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    path = packages / f"acme-{slot}/mine.yaml"
    path.write_text(shown)
    return path


@pytest.mark.parametrize("slot", PRESET_SLOTS)
def test_the_preset_of_its_readme_names_it(slot: str, packages: Path, plugins: Plugins) -> None:
    resolved = resolve(preset_of(packages, slot), (), plugins)
    assert any(str(origin).startswith(str(resolved.file)) for origin in resolved.origins.values())
    assert f"use: acme_{slot}" in to_yaml(resolved.experiment)


@pytest.mark.parametrize("slot", PRESET_SLOTS)
def test_its_study_compares_two_variants_from_three_seeds(slot: str, packages: Path, plugins: Plugins) -> None:
    study = read_study(packages / f"acme-{slot}/study.yaml", plugins)
    assert len(study.variants) == 2
    assert study.asked.seeds == (0, 1, 2)
    assert study.asked.name == f"acme-{slot}"
    changed = study.differences()[study.variants[1].name]
    assert any(f"acme_{slot}" in (path, *map(str, values)) or slot == "data" for path, values in changed.items())
    assert f"acme_{slot}" in to_yaml(study.variants[1].experiment)


ALL = (
    "model.block.attention={use: acme_attention, n_heads: 2, head_dim: 8}",
    "model.block.feedforward={router: {use: acme_router, top_k: 2}, balancer: {use: acme_balancer}}",
    "model.block.feedforward.dispatcher={use: acme_dispatcher}",
    "model.blocks.0={repeat: 1, feedforward: {use: acme_feedforward, hidden: 12}}",
    "objectives.acme_objective={}",
    "precision={use: acme_precision}",
    "parallel={pipeline: {use: acme_pipeline}, sharding: {use: acme_sharding}}",
    "optimizer={use: acme_optimizer}",
    "guard={use: acme_guard}",
    "data={use: acme_data}",
    "observers.acme_observer={every: 1}",
    "observers.ema=null",
    "objectives.mtp=null",
    "train.tokens=240",
    "train.lr=0.01",
)


def test_a_run_of_nothing_but_these_components_trains(plugins: Plugins, tmp_path: Path) -> None:
    small = [text for text in SMALL if not text.startswith(("model.block.attention", "model.block.feedforward.bal"))]
    experiment = resolve("v3-tiny", [*small, *ALL], plugins).experiment
    assert len(set(re.findall(r"use: (acme_\w+)", to_yaml(experiment)))) == len(PRESET_SLOTS)
    train(experiment, tmp_path / "run")
    rows = [row.split(",") for row in (tmp_path / "run/acme_observer.csv").read_text().splitlines()[1:]]
    assert Counter(name for _, name, _ in rows) == {"next_token": 5, "sequence_balance": 5, "acme_objective": 5}
    assert len({value for _, _, value in rows}) == 15
    assert all(math.isfinite(float(value)) for _, _, value in rows)


# --- what is refused ---


MISTAKES = [
    (["Acme Window", "--slot", "attention"], "cannot be the name of a package", "such as acme-window"),
    (["window-", "--slot", "attention"], "cannot be the name of a package", "such as window"),
    (["class", "--slot", "attention"], "cannot be the name of a package", "such as my-class"),
    (["3", "--slot", "router"], "cannot be the name of a package", "such as my-router"),
    (["../window", "--slot", "attention"], "cannot be the name of a package", "such as window"),
    (["json", "--slot", "observer"], "there is a Python module 'json' already", "such as my-json"),
    (["pytest", "--slot", "observer"], "there is a Python module 'pytest' already", "such as my-pytest"),
    (["aux-free", "--slot", "balancer"], "there is a balancer 'aux_free' already, of tangram", "my-aux-free"),
    (["window", "--slot", "atention"], "there is no slot 'atention'", "did you mean 'attention'?"),
    (["window", "--slot", "launcher"], "no package to start from for the slot launcher", "copy one of its components"),
    (["full", "--slot", "guard"], "full is there already", "choose another with --out"),
    (["window", "--slot", "guard", "--out", "file"], "file is there already", "choose another with --out"),
]


@pytest.mark.parametrize(("arguments", "said", "advice"), MISTAKES)
def test_a_mistake_is_told_with_what_to_do_and_writes_nothing(
    arguments: list[str],
    said: str,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    with pytest.raises(SystemExit) as exited:
        main(["new-plugin", *arguments])
    err = capsys.readouterr().err
    assert exited.value.code == 2
    assert said in err
    assert advice in err
    assert {str(path) for path in Path().rglob("*")} == {"full", "full/notes.txt", "file"}


def test_from_an_empty_directory_to_a_component_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["new-plugin", "acme-window", "--slot", "attention"],
        ["describe", "attention", "acme_window", "--plugin", "acme-window/acme_window.py"],
    ):
        with pytest.raises(SystemExit) as exited:
            main(arguments)
        assert exited.value.code == 0
    out = capsys.readouterr().out
    assert "acme-window/tests/test_acme_window.py" in out
    assert "Width of a head" in out


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert write_package("acme-x", "guard", tmp_path / "here", Plugins())
    with pytest.raises(ScaffoldError):
        write_package("acme-x", "guard", tmp_path / "here", Plugins())

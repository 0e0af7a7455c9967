"""The documents name everything there is, and what they show runs."""

import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch

from tangram.core import experiment, hookspecs
from tangram.core.cli import main
from tangram.core.context import Context
from tangram.core.contracts import SLOTS, Measured
from tangram.core.plugins import Plugins
from tangram.core.presets import available
from tangram.core.records import EvalReport, GradientNorm, Progress, Result, StepReport, Verdict
from tangram.core.schema import fields, summary
from tangram.core.study import read_study
from tangram.plugins.precision.fp8 import FP8Config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])
PLUGINS = Plugins.discover()
COMPONENTS = [entry for entry in PLUGINS.registry if entry.origin == "tangram"]
CONFIGS = [entry.config for entry in COMPONENTS] + [
    cls for cls in vars(experiment).values() if inspect.isclass(cls) and cls.__module__ == experiment.__name__
]
BLOCK = re.compile(r"^```(\w+)(?: ([^\n]+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_config_has_a_summary_and_an_entry_for_each_field_and_for_nothing_else(config: type) -> None:
    assert summary(config)
    for field in fields(config):
        assert field.doc, f"{config.__name__} has no Attributes entry for '{field.name}'"
    documented = re.findall(r"^ {8}(\w+): ", (config.__doc__ or "").partition("Attributes:")[2], re.MULTILINE)
    strangers = set(documented) - {field.name for field in attrs.fields(config)}
    assert not strangers, f"{config.__name__} documents {strangers}, which it does not have"


@pytest.mark.parametrize("slot", SLOTS)
def test_every_slot_stands_in_the_page_on_presets(slot: str) -> None:
    assert f"| `{slot}` |" in page("presets.md")


@pytest.mark.parametrize("name", available(PLUGINS))
def test_every_shipped_preset_stands_in_the_page_on_presets(name: str) -> None:
    assert re.search(rf"^\|[^|]*`{re.escape(name)}`", page("presets.md"), re.MULTILINE)


def test_the_page_of_components_is_what_they_say_of_themselves() -> None:
    generated = runpy.run_path(str(DOCS / "components.py"))["page"]()
    for entry in COMPONENTS:
        assert f"### {entry.mark.use}\n" in generated
    for field in (field for config in CONFIGS for field in fields(config)):
        ends = f"| `{field.name}` |", f"| {field.doc.replace('|', chr(92) + '|')} |"
        assert any(line.startswith(ends[0]) and line.endswith(ends[1]) for line in generated.splitlines()), ends
    assert page("components.md") == generated, "stale: run `python docs/components.py > docs/components.md`"


def signature(name: str) -> str:
    text = f"{name}{inspect.signature(getattr(hookspecs, name))}"
    return re.sub(r"(pathlib|collections\.abc)\.", "", text.replace("'", "")).replace("|", r"\|")


HOOKS = [name for name in vars(hookspecs) if name.startswith("tangram_")]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_stands_in_its_page_with_its_exact_signature(hook: str) -> None:
    assert f"| `{signature(hook)}` |" in page("observers.md")


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_tested(hook: str) -> None:
    others = [path for path in ROOT.joinpath("tests").rglob("*.py") if path != Path(__file__)]
    assert any(hook in path.read_text(encoding="utf-8") for path in others)


def test_the_page_on_observers_names_no_hook_that_is_not_there_and_every_observer() -> None:
    text = page("observers.md")
    assert set(re.findall(r"\btangram_\w+", text)) <= set(HOOKS)
    for entry in COMPONENTS:
        if entry.mark.slot == "observer":
            assert f"| `{entry.mark.use}` |" in text, f"observer '{entry.mark.use}' is not in docs/observers.md"


def test_every_column_of_the_metrics_stands_in_the_page_on_observers_and_no_other() -> None:
    result = Result({"NAME": 1.0}, 1.0, torch.tensor([[3, 1]]), 1)
    now, norm = Progress(), GradientNorm(1.0)
    step = StepReport(now, now, 0.1, result, norm, Verdict.ROLLBACK, routed={0: 2}, biases={0: 0.5})
    linear = Context(dim=4, precision=FP8Config(compute="float32").build()).linear(4, 4)
    assert isinstance(linear, Measured)
    measures = {name: {0: value} for name, value in linear.measures(torch.ones(1, 4)).items()}
    evaluation = EvalReport(now, {"NAME": 1.0}, 2.0, 1, 1, complete=True, measures=measures)
    for kind, row in (("step", step.metrics()), ("evaluation", evaluation.metrics())):
        written = {re.sub(r"\.0$", ".LAYER", name) for name in row}
        told = re.findall(rf"^\| `([\w.]+)` \| (?:{kind}|both) \|", page("observers.md"), re.MULTILINE)
        assert written == set(told)


def test_the_page_on_conformance_names_every_contract_and_every_capability_with_its_meaning() -> None:
    from tangram.testing.contracts import CONTRACTS

    text = (DOCS / "conformance.md").read_text(encoding="utf-8")
    for slot, contract in CONTRACTS.items():
        assert f"`{contract.__name__}`" in text
        for name, meaning in contract.optional.items():
            assert f"| {slot} | `{name}` | {meaning} |" in text


def test_every_slot_of_a_preset_has_a_contract() -> None:
    from tangram.testing.contracts import CONTRACTS

    assert set(SLOTS) - set(CONTRACTS) == {"launcher"}


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_every_link_leads_somewhere(file: Path) -> None:
    for target in LINK.findall(file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), f"{file.name} links to {target}"


def shell(line: str, folder: Path) -> None:
    """Run a line of a shell block in `folder`: a command of ours in this process, where torch is loaded."""
    if line.startswith("tangram ") and not set(line) & set("|><;&$`"):
        with pytest.raises(SystemExit) as exited:
            main(shlex.split(line)[1:])
        assert not exited.value.code, line
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", line]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"


def runs(name: str, folder: Path, marks: tuple[str, ...]) -> int:
    """Write the blocks of a page marked `file=NAME`, run its shell blocks of these marks, and return their lines."""
    ran = 0
    for language, mark, content in BLOCK.findall(page(name)):
        if mark.startswith("file="):
            (folder / mark.removeprefix("file=")).write_text(content, encoding="utf-8")
        elif language == "sh" and mark in marks:
            for line in content.splitlines():
                shell(line, folder)
                ran += 1
    return ran


@pytest.mark.parametrize("name", ["presets.md", "observers.md", "write-a-plugin.md", "studies.md", "parallel.md"])
def test_what_a_page_shows_runs_from_an_empty_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs(name, tmp_path, ("runnable",))


@pytest.mark.soak
def test_the_tutorial_goes_from_an_empty_folder_to_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs("write-a-plugin.md", tmp_path, ("runnable", "runnable soak"))
    told = (tmp_path / "study/report.md").read_text(encoding="utf-8")
    assert re.search(r"better|worse|within noise|inconclusive", told)


def test_the_tutorials_study_is_two_variants_from_three_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs("write-a-plugin.md", tmp_path, ()) == 0
    study = read_study(Path("study.yaml"), Plugins.discover())
    assert [variant.name for variant in study.variants] == ["base", "plain"]
    assert study.asked.seeds == (0, 1, 2)
    assert study.differences()["plain"]["model.block.attention.use"] == ("qk_norm", "gqa")

"""Twelve ways in which an installed package can be wrong: each is named with its version, and nothing else suffers."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from attrs import frozen
from forks import answers
from tiny import SMALL

from tangram.core.cli import main
from tangram.core.plugins import SLOW, Plugins

HEAD = """
from attrs import frozen
from tangram.core.hookspecs import HOOKIMPL
from tangram.core.registry import component
from tangram.plugins.training.guards import Skip
"""

COMPONENT = """
@component("guard", use="{use}")
@frozen(kw_only=True)
class Config:
    '''A guard.

    Attributes:
        limit: Bad steps in a row.
    '''

    limit: int = 10

    def build(self):
        return Skip(self.limit)
"""

BURN = f"""
import time
began = time.perf_counter()
while time.perf_counter() - began < {SLOW + 0.1}:
    pass
"""


@frozen
class Kind:
    """One way to be wrong.

    Attributes:
        text: The module, beyond its guard `acme_<kind>`.
        said: What is said of it.
        requires: What the package requires.
        usable: Whether its guard can be used all the same.
        guard: The guard of the module.
    """

    text: str
    said: str
    requires: str = "attrs"
    usable: bool = False
    guard: str = COMPONENT


KINDS = {
    "importing": Kind("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": Kind("def broken(:", "SyntaxError: invalid syntax"),
    "exiting": Kind("raise SystemExit(0)", "SystemExit: 0"),
    "arguments": Kind("@HOOKIMPL\ndef tangram_presets(where):\n    return []", "Argument(s) {'where'}"),
    "misspelt": Kind(
        "@HOOKIMPL\ndef tangram_preset():\n    return []", "there is no hook 'tangram_preset', did you mean"
    ),
    "raising": Kind("@HOOKIMPL\ndef tangram_presets():\n    raise OSError('no disk')", "OSError: no disk"),
    "taken": Kind(COMPONENT.format(use="skip").replace("Config", "Other"), "guard 'skip' comes from"),
    "buildless": Kind("", "Config has no method build", guard=COMPONENT.replace("def build", "def built")),
    "plain": Kind("", "Config is no attrs class", guard=COMPONENT.replace("@frozen(kw_only=True)", "")),
    "slow": Kind(BURN, " s to import, for which every command waits", usable=True),
    "silent": Kind(
        "", "does not document limit of Config", usable=True, guard=COMPONENT.replace("limit: Bad", "x: Bad")
    ),
    "newer": Kind("", "it needs tangram-lm >=99", requires="tangram-lm >=99"),
}


def install(site: Path, kinds: Mapping[str, Kind]) -> None:
    """Install a distribution for each kind, and one that is fine."""
    for number, (name, kind) in enumerate({**kinds, "fine": Kind("", "")}.items()):
        text = HEAD + kind.guard.format(use=f"acme_{name}") + kind.text
        (site / f"acme_{name}.py").write_text(text)
        info = site / f"acme_{name}-1.{number}.dist-info"
        info.mkdir()
        about = f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 1.{number}\nRequires-Dist: {kind.requires}\n"
        (info / "METADATA").write_text(about)
        (info / "entry_points.txt").write_text(f"[tangram]\n{name}-plugin = acme_{name}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("acme_")]:
        del sys.modules[name]


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    return int(exited.value.code or 0), *capsys.readouterr()


def with_guard(use: str) -> list[str]:
    short = ("train.tokens=96", "guard=null", f"guard.use={use}", "observers.ema=null", "objectives.mtp=null")
    return ["train", "v3-tiny", *SMALL, *short, "--out", f"run-{use}"]


@pytest.mark.parametrize("name", KINDS)
def test_it_is_named_nothing_else_suffers_and_only_a_run_that_uses_it_stops(
    name: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = KINDS[name]
    install(site, {name: kind})
    code, out, _ = called(capsys, "list", "--json")
    listed = json.loads(out)
    (told,) = listed["broken"] + listed["remarks"]
    assert code == 0
    assert (told["name"], told["origin"]) == (f"{name}-plugin", f"acme-{name} 1.0")
    assert kind.said in told.get("error", "") + told.get("text", "")
    assert bool(listed["remarks"]) == kind.usable
    guards = {row["use"]: row["origin"] for row in listed["components"] if row["slot"] == "guard"}
    assert guards["acme_fine"] == "acme-fine 1.1" and guards["skip"] == "tangram"
    assert (f"acme_{name}" in guards) == kind.usable
    code, _, err = called(capsys, *with_guard(f"acme_{name}"))
    if kind.usable:
        assert code == 0, err
    else:
        assert code == 3
        assert f"there is no guard 'acme_{name}'" in err
        assert f"{name}-plugin (acme-{name} 1.0) failed to load" in err and kind.said in err


def test_with_all_of_them_installed_every_command_works_and_names_each(tmp_path: Path) -> None:
    install(tmp_path, KINDS)
    commands = {"list": ["list"], "doctor": ["doctor", "--json"], "train": with_guard("acme_fine")}
    said = answers(commands, tmp_path, {**os.environ, "PYTHONPATH": path_of(tmp_path), "COLUMNS": "200"})
    for command, (code, text) in said.items():
        assert code == 0, (command, text)
    for number, (name, kind) in enumerate(KINDS.items()):
        for command in ("list", "doctor"):
            (line,) = [line for line in said[command][1].splitlines() if f"(acme-{name} 1.{number})" in line]
            assert f"{name}-plugin" in line and kind.said in line
    assert len((tmp_path / "run-acme_fine" / "metrics.jsonl").read_text().splitlines()) == 2


def path_of(folder: Path) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def test_metadata_that_cannot_be_read_are_named_and_hide_no_other_package(site: Path) -> None:
    install(site, {})
    damage = {"torn": b"[tangram]\nno equals sign\n", "nameless": b"[tangram]\nhere = acme_none\n", "binary": b"\xff"}
    for name, points in damage.items():
        (site / f"acme_{name}-2.0.dist-info").mkdir()
        (site / f"acme_{name}-2.0.dist-info" / "entry_points.txt").write_bytes(points)
    plugins = Plugins.discover()
    assert {broken.name for broken in plugins.broken} == {"entry_points.txt", "here"}
    assert all(str(site) in broken.origin for broken in plugins.broken)
    assert plugins.registry.get("guard", "acme_fine") is not None

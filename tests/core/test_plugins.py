"""Plugins are found one by one; a broken one is listed with its origin and stops nothing else."""

import sys
from pathlib import Path

import pytest

from tangram.core import hookspecs
from tangram.core.config import ConfigError
from tangram.core.hookspecs import HOOKIMPL
from tangram.core.plugins import Broken, PluginError, Plugins, run_manager

HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("tangram_"))

COMPONENT = """
from attrs import frozen
from tangram.core.hookspecs import HOOKIMPL
from tangram.core.registry import component

@component("guard", use="{use}")
@frozen(kw_only=True)
class Config:
    def build(self): ...
"""

HOOK = "@HOOKIMPL\ndef tangram_presets():\n    "
BROKEN = {
    "import": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named"),
    "syntax": ("def broken(:", "SyntaxError"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "raising": ("1 / 0", "ZeroDivisionError: division by zero"),
    "misspelt": (
        "@HOOKIMPL\ndef tangram_preset():\n    return []",
        "there is no hook 'tangram_preset', did you mean 'tangram_presets'?",
    ),
    "arguments": ("@HOOKIMPL\ndef tangram_presets(where):\n    return []", "Argument(s) {'where'}"),
    "unmarked": ("def tangram_presets():\n    return []", "tangram_presets is not marked @HOOKIMPL"),
    "watching": ("@HOOKIMPL\ndef tangram_step_ended(report): ...", "tangram_step_ended is for an observer"),
    "hook_raises": (HOOK + "raise OSError('no disk')", "OSError: no disk"),
    "hook_returns": (HOOK + "return 3", "returned 3, not a list of paths"),
    "preset_taken": (HOOK + "return ['v3-tiny.yaml']", "'v3-tiny' is there already"),
    "component_taken": (
        "@component('guard', use='taken')\n@frozen\nclass Other:\n    def build(self): ...",
        "guard 'taken' comes",
    ),
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install modules as distributions that declare entry points, and discover them."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def install(points: dict[str, str], **modules: str) -> Plugins:
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        for i, (name, value) in enumerate(points.items()):
            info = tmp_path / f"acme_{i}-0.{i}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{i}\nVersion: 0.{i}\n")
            (info / "entry_points.txt").write_text(f"[tangram]\n{name} = {value}\n")
        return Plugins.discover()

    yield install
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def ours(plugins: Plugins) -> list[str]:
    return [str(broken) for broken in plugins.broken if broken.origin != "tangram"]


# --- discovery ---


def test_everything_in_tree_loads_and_says_where_it_is_from():
    plugins = Plugins.discover()
    assert plugins.report() == ""
    assert {entry.origin for entry in plugins.registry} == {"tangram"}
    assert "synthetic" in plugins.registry.uses("data")
    assert "v3-tiny" in plugins.presets


def test_discovering_twice_finds_the_same():
    one, two = Plugins.discover(), Plugins.discover()
    assert list(one.registry) == list(two.registry)
    assert one.presets == two.presets


def test_an_installed_module_an_object_and_their_origins(installed):
    plugins = installed(
        {"module": "acme_module", "thing": "acme_object:thing"},
        acme_module=COMPONENT.format(use="from_module"),
        acme_object=COMPONENT.format(use="from_object") + "class Thing: ...\nthing = Thing()\n",
    )
    assert ours(plugins) == []
    assert plugins.registry.get("guard", "from_module").origin == "acme-0 0.0"
    assert plugins.registry.get("guard", "from_object").origin == "acme-1 0.1"


def test_two_entry_points_of_one_module_take_it_once(installed):
    plugins = installed(
        {"one": "acme_twice", "two": "acme_twice", "class": "acme_twice:Config"},
        acme_twice=COMPONENT.format(use="once"),
    )
    assert ours(plugins) == []
    assert "once" in plugins.registry.uses("guard")


def test_a_package_ships_presets(installed, tmp_path):
    (tmp_path / "acme-tiny.yaml").write_text("extends: v3-tiny\nname: acme-tiny\n")
    hook = f"@HOOKIMPL\ndef tangram_presets():\n    return [{str(tmp_path / 'acme-tiny.yaml')!r}]\n"
    plugins = installed({"acme": "acme_presets"}, acme_presets=COMPONENT.format(use="a") + hook)
    assert ours(plugins) == []
    assert plugins.presets["acme-tiny"] == tmp_path / "acme-tiny.yaml"


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_listed_and_its_neighbours_load(kind, installed):
    text, said = BROKEN[kind]
    plugins = installed(
        {"first": "acme_first", "broken": f"acme_{kind}", "last": "acme_last"},
        acme_first=COMPONENT.format(use="taken"),
        **{f"acme_{kind}": COMPONENT.format(use="half") + text},
        acme_last=COMPONENT.format(use="last"),
    )
    (broken,) = (broken for broken in plugins.broken if broken.origin != "tangram")
    assert (broken.name, broken.origin) == ("broken", "acme-1 0.1")
    assert said in broken.error
    assert {"taken", "last"} <= set(plugins.registry.uses("guard"))
    assert "half" not in plugins.registry.uses("guard")
    assert plugins.registry.get("guard", "taken").origin == "acme-0 0.0"
    assert "acme" not in str(plugins.presets)
    assert not [name for name, _ in plugins.manager.list_name_plugin() if name.startswith("acme-1")]


def test_a_keyboard_interrupt_is_no_broken_plugin(installed):
    with pytest.raises(KeyboardInterrupt):
        installed({"stop": "acme_stop"}, acme_stop="raise KeyboardInterrupt")


def test_plugins_that_break_alike_share_a_line(installed):
    plugins = installed({"one": "acme_gone", "two": "acme_gone"})
    plugins.broken = [Broken(broken.name, "acme", broken.error) for broken in plugins.broken]
    assert plugins.report() == "one, two (acme) failed to load: ModuleNotFoundError: No module named 'acme_gone'"


# --- files ---


def write(folder: Path, text: str, name: str = "window.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_file_is_a_plugin_and_its_classes_are_the_same_for_all_who_load_it(tmp_path):
    path = write(tmp_path, COMPONENT.format(use="filed"))
    one, two = Plugins(), Plugins()
    for plugins in (one, two, one):
        plugins.take_file(path)
    assert one.registry.get("guard", "filed").config is two.registry.get("guard", "filed").config
    assert one.registry.get("guard", "filed").origin == str(path)


def test_files_of_one_name_in_two_folders_are_two_plugins(tmp_path):
    plugins = Plugins()
    for use in ("left", "right"):
        (tmp_path / use).mkdir()
        plugins.take_file(write(tmp_path / use, COMPONENT.format(use=use)))
    assert plugins.registry.uses("guard") == ["left", "right"]


@pytest.mark.parametrize("kind", sorted(BROKEN.keys() - {"preset_taken", "component_taken"}))
def test_a_file_that_the_user_names_and_does_not_load_stops_at_once(kind, tmp_path):
    text, said = BROKEN[kind]
    path = write(tmp_path, COMPONENT.format(use="half") + text, f"file_{kind}.py")
    plugins = Plugins()
    with pytest.raises(PluginError) as caught:
        plugins.take_file(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert list(plugins.registry) == []


def test_a_file_that_is_not_there_is_a_mistake_of_the_command_line(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no plugin file .*none\.py"):
        Plugins.discover([tmp_path / "none.py"])


def test_a_file_that_is_not_python_says_so(tmp_path):
    with pytest.raises(PluginError, match=r"must end in \.py"):
        Plugins().take_file(write(tmp_path, "", "notes.txt"))


def test_a_repaired_file_loads(tmp_path):
    plugins = Plugins()
    with pytest.raises(PluginError):
        plugins.take_file(write(tmp_path, "1 / 0"))
    plugins.take_file(write(tmp_path, COMPONENT.format(use="repaired")))
    assert plugins.registry.uses("guard") == ["repaired"]


# --- observers ---


def test_there_are_seven_hooks_each_with_a_sentence():
    assert HOOKS == [
        "tangram_checkpoint_saved",
        "tangram_evaluated",
        "tangram_model_built",
        "tangram_presets",
        "tangram_run_ended",
        "tangram_run_started",
        "tangram_step_ended",
    ]
    assert all(getattr(hookspecs, hook).__doc__ for hook in HOOKS)


class Recorder:
    """Writes down every hook that it hears, with its arguments."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    @HOOKIMPL
    def tangram_run_started(self, run):
        self.heard.append(("run_started", run))

    @HOOKIMPL
    def tangram_model_built(self, run, model):
        self.heard.append(("model_built", run, model))

    @HOOKIMPL
    def tangram_step_ended(self, report):
        self.heard.append(("step_ended", report))

    @HOOKIMPL
    def tangram_evaluated(self, run, report):
        self.heard.append(("evaluated", run, report))

    @HOOKIMPL
    def tangram_checkpoint_saved(self, path):
        self.heard.append(("checkpoint_saved", path))

    @HOOKIMPL
    def tangram_run_ended(self, error):
        self.heard.append(("run_ended", error))


def test_an_observer_hears_every_hook_with_the_arguments_it_asked_for():
    one, two = Recorder(), Recorder()
    hook = run_manager({"one": one, "two": two}).hook
    hook.tangram_run_started(run="R")
    hook.tangram_model_built(run="R", model="M")
    hook.tangram_step_ended(run="R", report="S")
    hook.tangram_evaluated(run="R", report="E")
    hook.tangram_checkpoint_saved(run="R", path="P")
    hook.tangram_run_ended(run="R", error=None)
    assert one.heard == two.heard
    assert one.heard == [
        ("run_started", "R"),
        ("model_built", "R", "M"),
        ("step_ended", "S"),
        ("evaluated", "R", "E"),
        ("checkpoint_saved", "P"),
        ("run_ended", None),
    ]


def test_a_run_hears_nothing_of_another_run():
    one, two = Recorder(), Recorder()
    run_manager({"one": one})
    run_manager({"two": two}).hook.tangram_run_started(run="R")
    assert one.heard == []


class Misspelt:
    @HOOKIMPL
    def tangram_step_end(self, report): ...


class Arguments:
    @HOOKIMPL
    def tangram_step_ended(self, raport): ...


class Unmarked:
    def tangram_step_ended(self, report): ...


@pytest.mark.parametrize(
    ("observer", "said"),
    [
        (
            Misspelt,
            "observer 'mine': there is no hook 'tangram_step_end', did you mean 'tangram_step_ended'?",
        ),
        (Arguments, "observer 'mine': .*raport"),
        (Unmarked, "observer 'mine': tangram_step_ended is not marked @HOOKIMPL"),
    ],
)
def test_a_hook_that_would_never_be_heard_is_refused_naming_the_observer(observer, said):
    with pytest.raises(PluginError, match=said):
        run_manager({"fine": Recorder(), "mine": observer()})


def test_one_object_under_two_names_is_refused():
    observer = Recorder()
    with pytest.raises(PluginError, match="observer 'b': is registered already"):
        run_manager({"a": observer, "b": observer})

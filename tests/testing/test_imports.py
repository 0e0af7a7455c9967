"""The watch over double imports, which the whole test session ends with."""

from pathlib import Path
from types import ModuleType

from imports import imported_twice


def module(name: str, file: Path) -> ModuleType:
    result = ModuleType(name)
    result.__file__ = str(file)
    return result


def test_a_file_under_two_names_is_found(tmp_path: Path) -> None:
    file = tmp_path / "core" / "plan.py"
    modules = {
        "tangram.core.plan": module("a", file),
        "plan": module("b", tmp_path / "core" / ".." / "core" / "plan.py"),
    }
    assert imported_twice(modules, tmp_path) == ["core/plan.py is imported as plan and as tangram.core.plan"]


def test_a_bare_name_is_found(tmp_path: Path) -> None:
    modules = {"core": module("core", Path("/elsewhere/core/__init__.py"))}
    assert imported_twice(modules, tmp_path) == ["`core` is imported: say `tangram.core`"]


def test_aliases_and_files_elsewhere_are_no_copies(tmp_path: Path) -> None:
    one = module("a", tmp_path / "core" / "a.py")
    far = [module(name, Path("/elsewhere/b.py")) for name in "bc"]
    near = [module(name, tmp_path / ".venv" / "lib" / "c.so") for name in "de"]
    modules = {"a": one, "again": one, "b": far[0], "c": far[1], "d": near[0], "e": near[1], "sys": ModuleType("sys")}
    assert imported_twice(modules, tmp_path) == []

"""Up only: kernels <- core <- plugins; and the rooms that some libraries must not leave."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "core", "plugins", "testing")

MAY_IMPORT = {
    "kernels": {"kernels"},
    "core": {"kernels", "core", "presets"},
    "plugins": {"kernels", "core", "plugins"},
    "testing": {"kernels", "core", "testing"},
}

ROOMS = {
    "triton": ("kernels/",),
    "torch.distributed": (
        "core/channels.py",
        "core/groups.py",
        "core/executor.py",
        "core/launch.py",
        "plugins/parallel/",
        "testing/ranks.py",
    ),
    "wandb": ("plugins/observers/wandb.py",),
    "lm_eval": ("plugins/evaluation/harness.py",),
    "starlette": ("plugins/serving/",),
    "uvicorn": ("plugins/serving/",),
    "prometheus_client": ("plugins/serving/",),
}


def _sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def _imports(path: Path) -> Iterator[str]:
    """Yield the full names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_up_only(path: Path) -> None:
    folder, *inside = path.relative_to(ROOT).parts
    for name in _imports(path):
        if not _within(name, "tangram"):
            continue
        parts = name.split(".")
        assert parts[1] in MAY_IMPORT[folder], f"{path.name} imports {name}"
        if folder == "plugins" and parts[1] == "plugins":
            assert parts[2] == inside[0], f"a plugin of {inside[0]} imports {name}"


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    for name in _imports(path):
        for library, rooms in ROOMS.items():
            assert not _within(name, library) or place.startswith(rooms), f"{place} imports {name}"


def test_the_check_of_imports_sees_through_functions(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    import triton.language\n    from torch import distributed\n")
    assert set(_imports(file)) == {"triton.language", "torch.distributed"}


def test_relative_imports_are_not_used() -> None:
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_every_folder_of_sources_is_installed() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        "tangram." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in (*FOLDERS, "presets")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(listed) == found


def test_the_core_is_cheap_to_import_and_heavy_libraries_wait() -> None:
    code = (
        "import sys; import tangram.core, tangram.core.cli\n"
        "print([m for m in ('torch', 'wandb', 'triton', 'matplotlib', 'scipy', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_stays_one_idea() -> None:
    long = {path.name: n for path in _sources() if (n := len(path.read_text().splitlines())) > 450}
    assert set(long) <= {"contracts.py"}, long  # all contracts on one page are one idea

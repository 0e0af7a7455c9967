"""Which files of code a run used. A run may name them, but only the user has one imported: a run may be anyone's."""

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import attrs

from tangram.core.config import show_path
from tangram.core.experiment import Experiment
from tangram.core.plugins import FILE_MODULE, sha256_of

RUN_PRESET = "experiment.yaml"
"""What a run calls its preset. A preset file of this name is a run's word, and so is what it extends."""


def is_run(directory: Path) -> bool:
    """Return whether a run was begun there."""
    return (directory / RUN_PRESET).is_file()


def used_files(experiment: Experiment) -> dict[str, str]:
    """Return the SHA-256 of each single-file plugin that the experiment lists or takes a component from, by path."""
    modules = {type(config).__module__ for config in configs_in(experiment)}
    files = {str(sys.modules[name].__file__) for name in modules if name.startswith(FILE_MODULE)}
    return {file: sha256_of(Path(file)) for file in sorted(files | set(experiment.plugins)) if Path(file).is_file()}


def configs_in(value: object) -> Iterator[object]:
    """Yield every config inside `value`."""
    cls = type(value)
    parts: Iterable[object] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, tuple):
        parts = value
    elif attrs.has(cls):
        yield value
        parts = [getattr(value, field.name) for field in attrs.fields(cls)]
    for part in parts:
        yield from configs_in(part)


def recorded_files(directory: Path) -> dict[str, str]:
    """Return what the run in `directory` says it used, as `used_files` did when it began; {} if it does not say."""
    try:
        files = json.loads((directory / "about.json").read_text(encoding="utf-8"))["plugins"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {str(path): str(sha256) for path, sha256 in files.items()} if isinstance(files, dict) else {}


def changed_files(directory: Path, experiment: Experiment) -> list[str]:
    """Return a line for each plugin file that is not what it was when the run in `directory` began."""
    now = used_files(experiment)
    now = {Path(path).name: sha256 for path, sha256 in now.items()} | now
    lines = []
    for path, was in recorded_files(directory).items():
        current = now.get(path, now.get(Path(path).name))
        if current not in (None, was):
            lines.append(f"{show_path(Path(path))}, a plugin file: sha256 {was} when the run began, {current} now")
    return lines


def tell_changes(directory: Path, experiment: Experiment) -> None:
    """Warn of every plugin file that has changed since the run in `directory` began."""
    for line in changed_files(directory, experiment):
        warnings.warn(line, stacklevel=2)

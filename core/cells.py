"""The cells of a study: one variant trained from one seed, named by all that decides its numbers, each in a directory.

A cell's directory is a run directory with a small file beside, cell.json, that says what became of it. Two processes
never train one cell at once, and a cell that is done is never trained again.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeAlias

import attrs
from attrs import evolve, frozen

from tangram.core.config import Plain
from tangram.core.context import built
from tangram.core.experiment import Experiment
from tangram.core.files import write_whole
from tangram.core.plugins import IN_TREE, PluginError
from tangram.core.presets import to_yaml
from tangram.core.process import versions
from tangram.core.provenance import RUN_PRESET, configs_in
from tangram.core.registry import Registry
from tangram.core.structuring import plain
from tangram.core.study import Study

State: TypeAlias = Literal["pending", "running", "done", "failed", "diverged"]


@frozen
class Cell:
    """One variant from one seed.

    Attributes:
        id: Hash of everything that decides its numbers.
        variant: Name of the variant.
        seed: The seed.
        state: What became of it.
        why: Why it failed or diverged; empty otherwise.
    """

    id: str
    variant: str
    seed: int
    state: State = "pending"
    why: str = ""


def cells_of(study: Study, folder: Path) -> list[Cell]:
    """Write the directories of all cells that have none, and return the cells as they stand, variants innermost.

    Raises:
        ConfigError: The data of one cannot be read.
        PluginError: What one uses cannot be named for good.
    """
    known: list[tuple[object, str]] = []  # configs cannot be hashed: some hold maps
    cells = []
    for seed in study.asked.seeds:
        for variant in study.variants:
            experiment = variant.seeded(seed)
            data = variant.building(partial(_data, experiment, known))
            used = used_versions(experiment, study.plugins.registry)
            cells.append(_placed(Cell(_id(experiment, data, used), variant.name, seed), experiment, folder))
    return cells


def _data(experiment: Experiment, known: list[tuple[object, str]]) -> str:
    """Return the fingerprint of the data of an experiment; `known` has those that were built before."""
    train, vocab_size = experiment.train, experiment.model.vocab_size
    decides = (experiment.data, train, vocab_size)
    for asked, found in known:
        if asked == decides:
            return found
    known.append((decides, built("data", experiment.data.build, train, vocab_size).fingerprint))
    return known[-1][1]


def _id(experiment: Experiment, data: str, used: Mapping[str, str]) -> str:
    # Plugins count by what is in them, wherever they lie.
    text = json.dumps([plain(evolve(experiment, plugins=())), data, used], sort_keys=True)
    return sha256(text.encode()).hexdigest()[:16]


def used_versions(experiment: Experiment, registry: Registry) -> dict[str, str]:
    """Return what the numbers of an experiment depend on, beside its preset: torch, tangram, and plugins by file hash.

    Raises:
        PluginError: The source of a plugin is not there to hash.
    """
    used = {name: versions()[name] for name in ("torch", "tangram")}
    entries = {entry.config: entry for entry in registry}
    for config in configs_in(experiment):
        entry = entries.get(type(config))
        if entry is not None and entry.origin != IN_TREE:
            used[f"{entry.mark.slot}.{entry.mark.use}"] = _source_hash(type(config))
    return used


def _source_hash(config: type) -> str:
    import inspect

    try:
        return sha256(Path(inspect.getfile(config)).read_bytes()).hexdigest()
    except (OSError, TypeError) as error:
        raise PluginError(f"{config.__name__} has no source file to tell its version by: {error}") from None


def _placed(cell: Cell, experiment: Experiment, folder: Path) -> Cell:
    """Return the cell as its directory has it; make the directory where there is none."""
    directory = folder / cell.id
    found = read_cell(directory)
    if found is not None:
        return evolve(found, variant=cell.variant, seed=cell.seed)  # a variant may have been renamed
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / RUN_PRESET, to_yaml(experiment))
    write_cell(directory, cell)
    return cell


def read_cell(directory: Path) -> Cell | None:
    """Return the cell in a directory; None where there is none."""
    try:
        content: dict[str, Plain] = json.loads((directory / "cell.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Cell(**content)  # type: ignore[arg-type]


def write_cell(directory: Path, cell: Cell) -> None:
    """Write what became of a cell, whole or not at all."""
    write_whole(directory / "cell.json", json.dumps(attrs.asdict(cell), indent=1))


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a cell alone; wait while another process does. The system lets go of it however this process ends."""
    with (directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

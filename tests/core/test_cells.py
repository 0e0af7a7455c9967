"""Cells: named by what decides their numbers, held by one process at a time, and trained once."""

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from toy_study import NURSERY, STEPS, study, write

from tangram.core import cell_worker
from tangram.core.cells import Cell, cells_of, held, read_cell, write_cell
from tangram.core.plugins import Plugins
from tangram.core.reports import read_files
from tangram.core.study import read_study
from tangram.core.study_record import CellRecord

ONE = {"seeds: 3": "seeds: 1"}


def ids(folder: Path, replace: Mapping[str, str] | None = None) -> dict[tuple[str, int], str]:
    folder.mkdir(exist_ok=True)
    return {(cell.variant, cell.seed): cell.id for cell in cells_of(study(folder, replace), folder / "cells")}


def trained(folder: Path, preset: Mapping[str, str] | None = None) -> tuple[int, Path]:
    """Train the base of the toy study in this process."""
    asked = study(folder, ONE, preset)
    directory = folder / "cells" / cells_of(asked, folder / "cells")[0].id
    return worker(directory), directory


def worker(directory: Path, *arguments: str) -> int:
    return cell_worker.main([str(directory), "--plugin", str(NURSERY), *arguments])


def cell(directory: Path) -> Cell:
    found = read_cell(directory)
    assert found is not None
    return found


def test_every_variant_and_seed_has_a_cell_of_its_own(tmp_path: Path) -> None:
    found = ids(tmp_path)
    assert set(found) == {(variant, seed) for variant in ("base", "wide") for seed in range(3)}
    assert len(set(found.values())) == 6
    for name in found.values():
        assert cell(tmp_path / "cells" / name).state == "pending"


def test_what_a_change_of_one_variant_does_not_touch_keeps_its_name(tmp_path: Path) -> None:
    before, after = ids(tmp_path / "a"), ids(tmp_path / "b", {"hidden: 16": "hidden: 12"})
    assert [key for key in before if before[key] != after[key]] == [("wide", seed) for seed in range(3)]


def test_names_do_not_depend_on_where_the_study_lies_or_what_its_variants_are_called(tmp_path: Path) -> None:
    before, after = ids(tmp_path / "a"), ids(tmp_path / "b", {"wide:": "broad:"})
    assert list(before.values()) == list(after.values())


def test_the_code_of_a_plugin_file_that_is_used_is_part_of_the_name(tmp_path: Path) -> None:
    found = []
    for name, extra in (("a", ""), ("b", ""), ("c", "# another version\n")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.py").write_text(NURSERY.read_text() + extra)
        named = write(folder, {"seeds: 3": "seeds: 3\npatch: {plugins: [mine.py]}"})
        asked = read_study(named, Plugins.discover([folder / "mine.py"]))  # which has the launcher
        found.append([cell.id for cell in cells_of(asked, folder / "cells")])
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_a_plugin_that_is_not_used_is_not(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(TUTORIAL)
    asked = read_study(write(tmp_path), Plugins.discover([NURSERY, tmp_path / "other.py"]))
    assert [cell.id for cell in cells_of(asked, tmp_path / "cells")] == list(ids(tmp_path / "without").values())


TUTORIAL = '''
from attrs import frozen
from tangram.core import component

@component("observer", use="idle")
@frozen(kw_only=True)
class IdleConfig:
    """Does nothing."""

    def build(self):
        return object()
'''


def test_two_hold_no_cell_at_once(tmp_path: Path) -> None:
    with held(tmp_path), (tmp_path / "lock").open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with held(tmp_path):
        pass


def test_a_cell_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    code, directory = trained(tmp_path)
    assert (code, cell(directory).state) == (0, "done")
    before = (directory / "metrics.jsonl").stat().st_mtime_ns
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert worker(directory) == 0
    assert (directory / "metrics.jsonl").stat().st_mtime_ns == before


def test_the_checkpoints_of_a_cell_that_is_done_go_unless_they_are_wanted(tmp_path: Path) -> None:
    _, directory = trained(tmp_path)
    assert not (directory / "checkpoints").exists()
    shutil.rmtree(directory)
    cells_of(study(tmp_path, ONE), tmp_path / "cells")
    assert worker(directory, "--keep-checkpoints") == 0
    assert list((directory / "checkpoints").iterdir())


def test_a_cell_that_diverges_says_where_and_stays_so(tmp_path: Path) -> None:
    code, directory = trained(tmp_path, {"value: 0.01": "value: 1.0e+36", "data:": "guard: {use: raise}\ndata:"})
    assert (code, cell(directory).state) == (1, "diverged")
    assert "stopped before the update of step" in cell(directory).why
    before = (directory / "metrics.jsonl").stat().st_mtime_ns
    assert worker(directory) == 1
    assert (directory / "metrics.jsonl").stat().st_mtime_ns == before


BROKEN = '''
import os
from attrs import frozen
from tangram.core import component
from tangram.core.hookspecs import HOOKIMPL

@component("observer", use="breaks")
@frozen(kw_only=True)
class BreaksConfig:
    """Raises in the third step, while there is a file of that name."""

    def build(self):
        return Breaks()

class Breaks:
    @HOOKIMPL
    def tangram_step_ended(self, report):
        if report.after.step == 3 and os.path.exists("break"):
            raise OSError("the disk is full")
'''


def test_a_cell_that_fails_says_why_and_goes_on_from_its_checkpoint_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "breaks.py").write_text(BROKEN)
    (tmp_path / "break").touch()
    write(tmp_path, ONE, {"doom: {use: doom}": "breaks: {}"})
    found = Plugins.discover([NURSERY, tmp_path / "breaks.py"])
    first = cells_of(read_study(tmp_path / "study.yaml", found), tmp_path / "cells")[0]
    directory = tmp_path / "cells" / first.id
    assert worker(directory, "--plugin", str(tmp_path / "breaks.py")) == 1
    assert (cell(directory).state, cell(directory).why) == ("failed", "OSError: the disk is full")
    (tmp_path / "break").unlink()
    assert worker(directory, "--plugin", str(tmp_path / "breaks.py")) == 0
    assert cell(directory).state == "done"
    steps = [json.loads(row)["step"] for row in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_no_number_of_a_cell_that_is_not_done_is_counted(tmp_path: Path) -> None:
    _, directory = trained(tmp_path)
    whole = CellRecord(cell(directory), read_files(directory), None)
    assert whole.value("loss.next_token") is not None
    write_cell(directory, Cell("x", "base", 0, "running"))
    assert CellRecord(cell(directory), read_files(directory), None).value("loss.next_token") is None


def test_a_metric_is_the_mean_of_the_last_tenth_of_the_steps(tmp_path: Path) -> None:
    _, directory = trained(tmp_path, {"tokens: 48": "tokens: 160"})
    losses = [json.loads(row)["loss.next_token"] for row in (directory / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    record = CellRecord(cell(directory), read_files(directory), None)
    assert record.value("loss.next_token") == pytest.approx((losses[-1] + losses[-2]) / 2)
    assert record.value("eval.bits_per_byte") is None
    assert record.value("no such column") is None


def test_what_is_no_cell_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert worker(tmp_path) == 1
    assert "is no cell" in capsys.readouterr().err

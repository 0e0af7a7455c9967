"""What lies on a disk may rot, be cut off, not fit, or be hostile: it is noticed, and nothing else is lost."""

import json
import pickle
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from attacks import Trap, files_of_at_most
from tiny import tiny
from whole_runs import trained, write_preset

from tangram.core import checkpoint, load_run
from tangram.core.checkpoint import CheckpointError
from tangram.core.reports import read_run
from tangram.core.run import train

SAVING = ("train.tokens=288", "train.checkpoint_every=2", "train.keep_last=3")  # steps 2, 4 and 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(tiny(*SAVING), out)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file())


def damaged(content: bytes, kind: str, draw: random.Random) -> bytes:
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    bit = draw.randrange(8 * len(content))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize(("kind", "count"), [("flip", 200), ("cut", 100)])
def test_every_flipped_bit_and_every_cut_is_noticed_and_the_checkpoint_before_is_taken(
    run: Path, kind: str, count: int
) -> None:
    root, draw = run / "checkpoints", random.Random(count)
    files = files_of(root / "step-6")
    assert {file.name for file in files} >= {"model.safetensors", "optimizer.safetensors", "observer-ema.safetensors"}
    for i in range(count):
        file = files[i % len(files)]
        content = file.read_bytes()
        file.write_bytes(damaged(content, kind, draw))
        found = checkpoint.newest(root)
        assert found is not None and found.step == 4, f"{kind} {i} of {file.name} was not noticed"
        assert len(found.refused) == 1 and "step-6" in found.refused[0]
        file.write_bytes(content)
    assert checkpoint.newest(root).step == 6


def test_after_the_damage_a_run_is_resumed_from_what_is_whole_and_ends_the_same(finished: Path, run: Path) -> None:
    for step in (4, 6):
        (run / f"checkpoints/step-{step}/optimizer.safetensors").write_bytes(b"")
    train(tiny(*SAVING), run, resume=True)
    for name in ("model", "optimizer", "observer-ema"):
        kept = [(folder / f"checkpoints/step-6/{name}.safetensors").read_bytes() for folder in (finished, run)]
        assert kept[0] == kept[1]


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(run: Path) -> None:
    for manifest in run.glob("checkpoints/*/MANIFEST.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        train(tiny(*SAVING), run, resume=True)
    assert len(list(run.glob("checkpoints/*"))) == 3


def test_a_disk_that_fills_up_at_any_byte_leaves_the_checkpoint_before_whole(run: Path) -> None:
    root = run / "checkpoints"
    files, state = contents(root / "step-6")
    largest = max(file.stat().st_size for file in files_of(root / "step-6"))
    for i in range(20):
        with (
            files_of_at_most(i * (largest - 1) // 19),
            pytest.raises(CheckpointError, match=r"step-8 could not be written: .*make room, then --resume"),
        ):
            checkpoint.save(root, 8, files, state)
        assert {path.name for path in root.iterdir()} == {"step-2", "step-4", "step-6"}
        assert checkpoint.newest(root).step == 6
    checkpoint.save(root, 8, files, state)
    assert checkpoint.newest(root).step == 8


def contents(path: Path) -> tuple[dict[str, dict], dict[str, object]]:
    files = {file.stem: checkpoint.read_file(path, file.stem) for file in path.glob("*.safetensors")}
    return files, checkpoint.read_state(path)


def test_a_run_that_finds_the_disk_full_says_so_and_exits_with_1(tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "short.yaml", "train.tokens=480", "train.checkpoint_every=2")
    limit = 60_000  # the preset and the metrics fit, the optimizer's file does not
    code, said = trained(preset, tmp_path / "run", most_bytes=limit)
    assert code == 1, said
    assert "step-2 could not be written: " in said
    assert "Traceback" not in said


@pytest.mark.parametrize("dressed", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_any_file_executes_nothing(run: Path, tmp_path: Path, dressed: str) -> None:
    sprung, mined = tmp_path / "sprung", tmp_path / "mined"
    if dressed == "pickle":
        mined.write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save({"weights": Trap(sprung)}, mined)
    places = [path for path in sorted(run.rglob("*")) if path.is_file() and "step-6" in str(path.parent.name)]
    places += [path for path in sorted(run.iterdir()) if path.is_file()]
    for place in places:
        content = place.read_bytes()
        shutil.copy(mined, place)
        if place.parent.name == "step-6" and place.name != checkpoint.MANIFEST:
            (place.parent / checkpoint.MANIFEST).unlink()
            checkpoint.seal(place.parent, 6)  # as whoever put it there would
        for use in (lambda path: load_run(path, averaged=True), read_run, resumed):  # a report reads nothing else
            with suppress(Exception):  # any refusal will do
                use(run)
            assert not sprung.exists(), f"{place} was executed"
        place.write_bytes(content)
        (run / "checkpoints/step-6" / checkpoint.MANIFEST).unlink(missing_ok=True)
        checkpoint.seal(run / "checkpoints/step-6", 6)
    assert load_run(run).progress.step == 6
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap is one


def resumed(run: Path) -> None:
    train(tiny(*SAVING), run, resume=True)


def test_a_run_directory_holds_no_pickle(run: Path) -> None:
    for path in run.rglob("*"):
        if path.is_file():
            start = path.read_bytes()[:4]
            assert not start.startswith((b"\x80", b"PK")), f"{path} is a pickle or a zip of them"


def test_old_checkpoints_go_only_after_a_newer_one_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"model": {"a": torch.arange(4.0)}}
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, files, {})
        checkpoint.prune(tmp_path, step, keep_last=2, keep_every=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-6", "step-7"]
    rotten = checkpoint.save(tmp_path, 8, files, {}) / "model.safetensors"
    rotten.write_bytes(rotten.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="step-8"):
        checkpoint.prune(tmp_path, 8, keep_last=1, keep_every=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-6", "step-7", "step-8"]


def test_what_a_crash_left_is_cleared_away_and_what_was_sealed_is_kept(tmp_path: Path) -> None:
    sealed = checkpoint.save(tmp_path, 4, {"model": {"a": torch.arange(4.0)}}, {})
    sealed.rename(tmp_path / ".step-4.writing")
    (tmp_path / ".step-6.writing").mkdir()
    (tmp_path / ".step-6.writing/model.safetensors").write_bytes(b"half")
    checkpoint.settle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert checkpoint.newest(tmp_path).step == 4


def test_what_saving_cost_is_measured(run: Path) -> None:
    saving = json.loads((run / "verdict.json").read_text())["saving"]
    assert saving["checkpoints"] == 3
    assert saving["writing"] > 0
    assert saving["held_up"] > 0

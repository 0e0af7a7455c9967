"""A checkpoint that several ranks wrote reads as if one had, for whoever asks for which experts."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.core import checkpoint
from tangram.core.checkpoint import CheckpointError, Team
from tangram.core.parts import Parts, PartsReader, share_name

EXPERTS, VECTOR = 12, 6


def tensors() -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(0)
    return {
        "whole": torch.randn(5, 3, generator=stream),
        "bias": torch.randn(4, generator=stream),
        "vector": torch.randn(VECTOR, generator=stream),
        "experts": torch.randn(EXPERTS, 2, 3, generator=stream),
    }


def together(root: Path, ranks: int, broken: int = -1) -> dict[int, str]:
    """Save as so many ranks, threads here; return what each was told that went wrong."""
    meeting, said, told = threading.Barrier(ranks), [[""] for _ in range(ranks)], {}

    def tell(rank: int, words: list[str]) -> list[str]:
        said[rank] = words
        meeting.wait(30)
        heard = [word for each in said for word in each]
        meeting.wait(30)
        return heard

    def save(rank: int) -> None:
        size, all_tensors = EXPERTS // ranks, tensors()
        mine = range(rank * size, (rank + 1) * size)
        state = {share_name("experts", mine): all_tensors["experts"][mine.start : mine.stop], "step": 7}
        some = range(rank * VECTOR // ranks, (rank + 1) * VECTOR // ranks)
        state[share_name("vector", some)] = all_tensors["vector"][some.start : some.stop]
        if rank == 0:
            state["whole"] = all_tensors["whole"]
        if rank == ranks - 1:
            state["bias"] = all_tensors["bias"]

        def stream(folder: Path) -> None:
            if rank == broken:
                raise OSError(28, "No space left on device")

        team = Team(rank, ranks, lambda words: tell(rank, words))
        try:
            checkpoint.save(root, 3, {"model": state}, {"rank": rank}, stream, team)
        except CheckpointError as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


@pytest.fixture(scope="module", params=[1, 2, 4])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    assert together(root, request.param) == {}
    checkpoint.verify(root / "step-3")
    return root / "step-3"


def test_the_first_rank_writes_the_state_and_the_manifest_names_every_part(saved: Path) -> None:
    assert checkpoint.read_state(saved) == {"rank": 0}
    manifest = (saved / "MANIFEST.json").read_text()
    assert all(path.name in manifest for path in saved.glob("*.safetensors"))


def test_all_of_it_is_read(saved: Path) -> None:
    read, expected = checkpoint.read_file(saved, "model"), tensors()
    assert read.pop("step") == 7
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], value) for key, value in expected.items())
    assert Parts(saved, "model").shape("experts") == expected["experts"].shape


@given(first=st.integers(0, EXPERTS - 1), count=st.integers(0, EXPERTS))
def test_any_experts_are_read(saved: Path, first: int, count: int) -> None:
    wanted = range(first, min(first + count, EXPERTS))
    assert torch.equal(Parts(saved, "model").read("experts", wanted), tensors()["experts"][wanted.start : wanted.stop])


@given(start=st.integers(0, 2 * EXPERTS), count=st.integers(0, 2 * EXPERTS))
def test_any_rows_are_read(saved: Path, start: int, count: int) -> None:
    stop = min(start + count, 2 * EXPERTS)
    with PartsReader(saved, "model") as reader:
        assert reader.specs["experts"].shape == (EXPERTS, 2, 3)
        assert torch.equal(reader.read("experts", start, stop), tensors()["experts"].flatten(0, 1)[start:stop])
        assert torch.equal(reader.read("whole"), tensors()["whole"])
        assert torch.equal(reader.read("vector"), tensors()["vector"].view(1, VECTOR))


@pytest.mark.parametrize("broken", [0, 1])
def test_if_one_cannot_write_all_are_told_and_nothing_is_left(broken: int, tmp_path: Path) -> None:
    told = together(tmp_path, 2, broken)
    assert told.keys() == {0, 1}
    assert all("No space left on device" in text for text in told.values())
    assert list(tmp_path.iterdir()) == []

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tangram.core import checkpoint
from tangram.core.checkpoint import CheckpointError


def _save(root: Path, step: int = 3) -> Path:
    files = {"model": {"a": torch.arange(4.0), "n": 7, "name": "x"}, "guard": {"in_a_row": 2}}
    return checkpoint.save(root, step, files, {"progress": {"step": step}})


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = _save(tmp_path)
    assert path == tmp_path / "step-3"
    read = checkpoint.read_file(path, "model")
    assert torch.equal(read.pop("a"), torch.arange(4.0))
    assert read == {"n": 7, "name": "x"}
    assert checkpoint.read_file(path, "guard") == {"in_a_row": 2}
    assert checkpoint.read_state(path) == {"progress": {"step": 3}}


def test_the_newest_whole_checkpoint_is_found_and_newer_torn_ones_are_named(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    _save(tmp_path, 2)
    newest = _save(tmp_path, 10)
    (tmp_path / ".step-11.writing").mkdir()
    assert checkpoint.newest(tmp_path).step == 10
    (newest / "model.safetensors").write_bytes(b"short")
    found = checkpoint.newest(tmp_path)
    assert found.step == 2
    assert len(found.refused) == 1
    assert "step-10/model.safetensors: differs from its manifest" in found.refused[0]


@pytest.mark.parametrize("name", ["model.safetensors", "guard.safetensors", "state.json", "MANIFEST.json"])
@given(data=st.data())
def test_a_flipped_bit_or_a_cut_is_detected_in_every_file(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    path = _save(tmp_path_factory.mktemp("root"))
    content = bytearray((path / name).read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        bit = data.draw(st.integers(0, 8 * len(content) - 1), label="bit")
        content[bit // 8] ^= 1 << bit % 8
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        checkpoint.verify(path)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    moved = _save(tmp_path, 3).rename(tmp_path / "step-4")
    with pytest.raises(CheckpointError, match="not as it was written"):
        checkpoint.verify(moved)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = _save(tmp_path)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json: No such file"):
        checkpoint.verify(path)
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        checkpoint.newest(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"model": nn.Linear(2, 2).state_dict()}, {})
    with pytest.raises(CheckpointError, match="does not fit the experiment"):
        checkpoint.load_model(path, nn.Linear(3, 2))


def test_the_optimizers_state_of_a_parameter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    linear = nn.Linear(3, 2)
    optimizer, state = torch.optim.SGD(linear.parameters(), lr=0.1), {"elsewhere.weight/momentum": torch.ones(2)}
    path, held = checkpoint.save(tmp_path, 1, {"optimizer": state}, {}), dict(linear.named_parameters())
    with pytest.raises(CheckpointError, match=r"names elsewhere\.weight, which the experiment does not have"):
        checkpoint.load_optimizer(path, optimizer, held)
    checkpoint.load_optimizer(path, optimizer, held, whole=False)  # it may be another rank's
    assert not optimizer.state


def test_what_was_never_written_is_not_read_as_nothing(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"model": {}}, {})
    assert checkpoint.read_file(path, "model") == {}
    with pytest.raises(FileNotFoundError, match="optimizer"):
        checkpoint.read_file(path, "optimizer")


def test_optimizer_state_goes_by_address_and_comes_back_bitwise(tmp_path: Path) -> None:
    def stepped() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        linear = nn.Linear(3, 2)
        return linear, torch.optim.AdamW(linear.parameters(), lr=0.1, fused=True)

    linear, optimizer = stepped()
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    addresses = {parameter: address for address, parameter in linear.named_parameters()}
    state = checkpoint.optimizer_state(optimizer, addresses)
    assert {name.rpartition("/")[0] for name in state} == {"weight", "bias"}
    path = checkpoint.save(tmp_path, 1, {"optimizer": state}, {})
    other, fresh = stepped()
    checkpoint.load_optimizer(path, fresh, dict(other.named_parameters()))
    again = checkpoint.optimizer_state(fresh, {p: a for a, p in other.named_parameters()})
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    for file in _save(tmp_path).iterdir():
        assert file.suffix in (".json", ".safetensors")
        if file.suffix == ".json":
            json.loads(file.read_bytes())

"""Files of tensors in pieces: what the safetensors library writes and reads, and nothing less."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tangram.core.tensor_file import DTYPES, Spec, TensorFileError, TensorReader, TensorWriter

shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


def values(spec: Spec, seed: int) -> torch.Tensor:
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed)).to(spec.dtype)


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(0, -2)


@given(specs=st.lists(st.builds(Spec, st.sampled_from(list(DTYPES.values())), shapes), max_size=5), random=st.randoms())
def test_rows_in_any_order_are_the_file_that_the_library_reads(specs, random, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    wanted = {f"é{i}": spec for i, spec in enumerate(specs)}
    tensors = {name: values(spec, i) for i, (name, spec) in enumerate(wanted.items())}
    rows = []
    for name, spec in wanted.items():
        cuts = sorted({0, spec.rows, *(random.randint(0, spec.rows) for _ in range(2))})
        rows += [(name, start, stop) for start, stop in pairwise(cuts)]
    random.shuffle(rows)
    with TensorWriter(path, wanted, {"format": "pt"}) as file:
        for name, start, stop in rows:
            file.write(name, matrix(tensors[name])[start:stop], start)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    with TensorReader(path) as file:
        assert file.specs == wanted
        for name, start, stop in rows:
            assert torch.equal(file.read(name, start, stop).float(), matrix(tensors[name])[start:stop].float())


def test_every_tensor_lies_at_a_multiple_of_its_elements_size(tmp_path):
    """Readers that map the file make tensors of what lies there; the widest elements have eight bytes."""
    specs = {name: Spec(dtype, (3,)) for name, dtype in sorted(DTYPES.items(), key=lambda item: item[1].itemsize)}
    with TensorWriter(tmp_path / "x", specs, {}) as file:
        for name, spec in specs.items():
            file.write(name, values(spec, 0))
    content = (tmp_path / "x").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % specs[name].dtype.itemsize == 0


def test_what_the_library_wrote_is_read(tmp_path):
    tensors = {"a": torch.arange(24.0).view(2, 3, 4), "b": torch.arange(5).bfloat16(), "c": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    with TensorReader(tmp_path / "x") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name).view(tensor.shape), tensor)
        assert torch.equal(file.read("a", 2, 5), tensors["a"].view(6, 4)[2:5])


@pytest.mark.parametrize(("pieces", "error"), [
    ([(0, 2), (3, 4)], "rows 2 to 3 of a: never"),
    ([(0, 3)], "rows 3 to 4 of a: never"),
    ([(1, 4)], "rows 0 to 1 of a: never"),
    ([], "rows 0 to 4 of a: never"),
    ([(0, 3), (2, 4)], "rows 2 to 3 of a: twice"),
])  # fmt: skip
def test_rows_written_twice_or_never_are_an_error_on_leaving(tmp_path, pieces, error):
    with pytest.raises(ValueError, match=error):
        write(tmp_path / "x", pieces)


def write(path: Path, pieces: list[tuple[int, int]]) -> None:
    with TensorWriter(path, {"a": Spec(torch.float32, (4, 2))}, {}) as file:
        for start, stop in pieces:
            file.write("a", torch.zeros(stop - start, 2), start)


@pytest.mark.parametrize("rows", [torch.zeros(2, 2).half(), torch.zeros(3), torch.zeros(3, 2)])
def test_rows_that_do_not_fit_are_refused(tmp_path, rows):
    with (
        pytest.raises(ValueError, match="a "),
        TensorWriter(tmp_path / "x", {"a": Spec(torch.float32, (4, 2))}, {}) as file,
    ):
        file.write("a", rows, 2)


def test_an_error_inside_is_the_error_that_comes_out(tmp_path):
    with (
        pytest.raises(KeyError),
        TensorWriter(tmp_path / "x", {"a": Spec(torch.float32, (4, 2))}, {}),
    ):
        raise KeyError("mine")


def header(entry: object) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content", [
    b"",
    b"short",
    (100).to_bytes(8, "little") + b"{}",
    (4).to_bytes(8, "little") + b"{[}]" + bytes(8),
    (2).to_bytes(8, "little") + b"[]",
    header(GOOD) + bytes(7),
    header(GOOD | {"shape": [3]}) + bytes(8),
    header(GOOD | {"data_offsets": [-8, 0]}) + bytes(8),
    header(GOOD | {"dtype": "I64", "data_offsets": [0, 16]}) + bytes(16),
    header({"shape": [2]}) + bytes(8),
    header(7),
])  # fmt: skip
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(TensorFileError, match=r"x\.safetensors: no whole safetensors file"):
        TensorReader(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TensorFileError, match="x: No such file"):
        TensorReader(tmp_path / "x")

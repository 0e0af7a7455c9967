"""Checkpoints: safetensors and JSON under a manifest of hashes, written aside and renamed into place; no pickle."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor, nn

from tangram.core.contracts import State

MANIFEST = "MANIFEST.json"


class CheckpointError(Exception):
    """A checkpoint cannot be read; the message names the file and what is wrong."""


@frozen
class Found:
    """A checkpoint that may be resumed from.

    Attributes:
        path: Its directory.
        step: Steps taken when it was written.
        refused: Newer checkpoints that were passed over, each with the reason.
    """

    path: Path
    step: int
    refused: tuple[str, ...] = ()


def save(
    root: Path,
    step: int,
    files: Mapping[str, State],
    state: Mapping[str, object],
    stream: Callable[[Path], object] | None = None,
) -> Path:
    """Write `root/step-N` whole or not at all.

    Args:
        root: The run's folder of checkpoints.
        step: Steps taken.
        files: Contents of each file, by name without suffix.
        state: What goes into state.json.
        stream: Writes further files into the folder that it is given: what is too large for a `State`.

    Raises:
        CheckpointError: The disk is full, or refuses; earlier checkpoints are as they were.
    """
    from safetensors import SafetensorError

    final = root / f"step-{step}"
    scratch = root / f".step-{step}.writing"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name, content in files.items():
            _write_state(scratch / f"{name}.safetensors", content)
        if stream is not None:
            stream(scratch)
        _write(scratch / "state.json", json.dumps(state, indent=1).encode())
        seal(scratch, step)
        _commit(scratch, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"{final} could not be written: {why}; the checkpoints before it are whole: make room, then --resume"
        ) from error
    return final


def seal(folder: Path, step: int) -> None:
    """Write the manifest of all files in `folder`: from here on it is a checkpoint."""
    entries = {path.name: _entry(path) for path in sorted(folder.iterdir())}
    _write(folder / MANIFEST, _manifest(step, entries))
    _sync(folder)


def prune(root: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Delete old checkpoints once that of `step` is verified.

    Args:
        root: The run's folder of checkpoints.
        step: The newest, which was just written.
        keep_last: Newest checkpoints to keep.
        keep_every: Those at multiples of so many steps are kept too; 0 for none.

    Raises:
        CheckpointError: What was just written is not whole; nothing was deleted.
    """
    verify(root / f"step-{step}")
    older = sorted((n for n in map(_step_of, root.glob("step-*")) if 0 <= n <= step), reverse=True)
    for number in older[keep_last:]:
        if not keep_every or number % keep_every:
            doomed = root / f".step-{number}.deleted"  # a name that no reader takes for a checkpoint
            (root / f"step-{number}").rename(doomed)
    for doomed in root.glob(".step-*.deleted"):
        shutil.rmtree(doomed, ignore_errors=True)


def settle(root: Path) -> None:
    """Finish what a crash cut off: put sealed checkpoints into their place, and clear away what was not sealed.

    Only the process that saves may.
    """
    for scratch in root.glob(".step-*.writing"):
        try:
            verify(scratch)
        except CheckpointError:
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            _commit(scratch, root / f"step-{_step_of(scratch)}")


def _manifest(step: int, entries: Mapping[str, object]) -> bytes:
    return json.dumps({"step": step, "files": entries}, indent=1).encode()


def _commit(scratch: Path, final: Path) -> None:
    if final.exists():  # left by a run that was resumed from before it, or rolled back to it
        shutil.rmtree(final)
    scratch.rename(final)
    _sync(final.parent)


def newest(root: Path) -> Found | None:
    """Return the newest checkpoint that its manifest confirms, and why newer ones were refused."""
    refused = []
    for path in sorted(root.glob("step-*"), key=_step_of, reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        return Found(path, _step_of(path), tuple(refused))
    if refused:
        raise CheckpointError("no checkpoint is whole: " + "; ".join(refused))
    return None


def verify(path: Path) -> None:
    """Compare every file with the manifest, and the manifest with what would be written.

    Raises:
        CheckpointError: Something is missing, cut or changed.
    """
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = json.loads(content)
        entries = dict(manifest["files"])
        if content != _manifest(_step_of(path), entries):
            raise ValueError("it is not as it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no readable {MANIFEST} ({error})") from None
    for name, entry in entries.items():
        try:
            if _entry(path / name) != entry:
                raise CheckpointError(f"{path / name}: differs from its manifest")
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from None


def read_state(path: Path) -> dict[str, object]:
    """Return the content of state.json."""
    return dict(json.loads((path / "state.json").read_bytes()))


def read_file(path: Path, name: str) -> dict[str, Tensor | int | float | str]:
    """Return the content of one file by its name without suffix."""
    from safetensors import safe_open

    with safe_open(path / f"{name}.safetensors", framework="pt") as file:
        content: dict[str, Tensor | int | float | str] = json.loads((file.metadata() or {}).get("values", "{}"))
        content |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file is no mapping)
        return content


def load_model(path: Path, model: nn.Module) -> None:
    """Load the weights and biases; names and shapes must agree exactly."""
    state = {key: value for key, value in read_file(path, "model").items() if isinstance(value, Tensor)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path / 'model.safetensors'} does not fit the experiment: {error}") from None


def optimizer_state(optimizer: torch.optim.Optimizer, addresses: Mapping[nn.Parameter, str]) -> State:
    """Return the optimizer's state under `address/key`."""
    return {
        f"{address}/{key}": value
        for parameter, address in addresses.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Load the optimizer's state by address, in place of any that it has."""
    optimizer.state.clear()
    for name, value in read_file(path, "optimizer").items():
        address, _, key = name.rpartition("/")
        if address not in parameters:
            raise CheckpointError(f"{path / 'optimizer.safetensors'}: no parameter {address} in the experiment")
        optimizer.state[parameters[address]][key] = value


def _write_state(path: Path, content: State) -> None:
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in content.items() if isinstance(value, Tensor)}
    values = {key: value for key, value in content.items() if not isinstance(value, Tensor)}
    save_file(tensors, path, metadata={"values": json.dumps(values)})
    _sync(path)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _step_of(path: Path) -> int:
    number = path.name.removeprefix(".").removesuffix(".writing").removeprefix("step-")
    return int(number) if number.isdigit() else -1

"""Checkpoints: safetensors and JSON under a manifest of hashes, written aside and renamed into place; no pickle."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from attrs import field, frozen
from torch import Tensor, nn

from tangram.core.contracts import State
from tangram.core.parts import Parts, file_of, share_name

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


@frozen(eq=False)
class Team:
    """The ranks that write a checkpoint together.

    Attributes:
        rank: Which of them this is.
        ranks: How many they are.
        tell: Tells all what this one says, waits for the others, and returns what all said.
    """

    rank: int = 0
    ranks: int = 1
    tell: Callable[[list[str]], list[str]] = field(default=lambda said: said)

    def meet(self, trouble: str) -> str:
        """Wait for the others; return the first trouble that any had."""
        return next((said for said in self.tell([trouble]) if said), "")


def save(
    root: Path,
    step: int,
    files: Mapping[str, State],
    state: Mapping[str, object],
    stream: Callable[[Path], object] | None = None,
    team: Team | None = None,
) -> Path:
    """Write `root/step-N` whole or not at all.

    Args:
        root: The run's folder of checkpoints.
        step: Steps taken.
        files: Contents of each file, by name without suffix.
        state: What goes into state.json.
        stream: Writes further files into the folder that it is given: what is too large for a `State`.
        team: The ranks that write it together, in a folder that all of them see.

    Raises:
        CheckpointError: The disk is full, or refuses, for this rank or another; earlier checkpoints are as they were.
    """
    final, team = root / f"step-{step}", team or Team()
    scratch = root / f".step-{step}.writing"

    def begin() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)

    def write() -> None:
        for name, content in files.items():
            _write_state(scratch / f"{file_of(name, team.rank, team.ranks)}.safetensors", content)
        if stream is not None:
            stream(scratch)

    def end() -> None:
        _write(scratch / "state.json", json.dumps(state, indent=1).encode())
        seal(scratch, step)
        _commit(scratch, final)

    for part, alone in ((begin, True), (write, False), (end, True)):
        error = None if alone and team.rank else _trouble_with(part)
        trouble = team.meet("" if error is None else getattr(error, "strerror", None) or str(error))
        if trouble:
            shutil.rmtree(scratch, ignore_errors=True)
            raise CheckpointError(
                f"{final} could not be written: {trouble}; the checkpoints before it are whole: make room, "
                "then --resume"
            ) from error
    return final


def _trouble_with(part: Callable[[], None]) -> Exception | None:
    """Do a part of the writing; return what went wrong."""
    from safetensors import SafetensorError

    try:
        part()
    except (OSError, SafetensorError) as error:
        return error
    return None


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


def read_file(
    path: Path, name: str, only: Container[str] | None = None, shares: Mapping[str, range] = MappingProxyType({})
) -> dict[str, Tensor | int | float | str]:
    """Return what was written under a name without suffix.

    Args:
        path: The checkpoint.
        name: The name.
        only: The tensors to read; by default all.
        shares: The experts to read, for each tensor of which not all are wanted.
    """
    parts = Parts(path, name)
    keys = [key for key in parts.keys() if only is None or key in only]  # noqa: SIM118 (no mapping)
    return dict(parts.values) | {key: parts.read(key, shares.get(key)) for key in keys}


def in_shares(state: State, owned: Container[str], shares: Mapping[str, range]) -> State:
    """Return of a state by address what is `owned`; what is a share of the experts bears its name."""
    return {share_name(key, shares[key]) if key in shares else key: v for key, v in state.items() if key in owned}


def load_model(
    path: Path,
    model: nn.Module,
    shares: Mapping[str, range] = MappingProxyType({}),
    *,
    whole: bool = True,
    but: tuple[str, ...] = (),
) -> None:
    """Load the weights and biases that the model holds.

    Args:
        path: The checkpoint.
        model: The model.
        shares: The experts that it holds, for each address of which it holds not all.
        whole: Whether it holds all stages.
        but: Beginnings of addresses that are neither read nor missed.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    parts = Parts(path, "model")
    held = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(but)}
    there = {key: parts.shape(key) for key in parts.keys() if not key.startswith(but)}  # noqa: SIM118 (no mapping)
    for key, tensor in held.items():
        wanted = tensor.shape
        if key in there and key in shares and shares[key].stop <= there[key][0]:
            wanted = torch.Size([there[key][0], *tensor.shape[1:]])
        if there.get(key) != wanted:
            said = "is missing" if key not in there else f"has shape {list(there[key])}, not {list(wanted)}"
            raise CheckpointError(f"{path}: the model does not fit the experiment: {key} {said}")
    if whole and len(there) > len(held):
        raise CheckpointError(f"{path}: the model does not fit the experiment: {min(there.keys() - held)} is too many")
    with torch.no_grad():
        for key, tensor in held.items():
            tensor.copy_(parts.read(key, shares.get(key)))


def optimizer_state(
    optimizer: torch.optim.Optimizer,
    addresses: Mapping[nn.Parameter, str],
    shares: Mapping[str, range] = MappingProxyType({}),
) -> State:
    """Return the optimizer's state under `address/key`, of shares of experts under `address/key[from:to]`."""
    return {
        _in_share(f"{address}/{key}", value, parameter, shares.get(address)): value
        for parameter, address in addresses.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _in_share(key: str, value: object, parameter: nn.Parameter, experts: range | None) -> str:
    if experts is None or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return key
    return share_name(key, experts)


def load_optimizer(
    path: Path,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    shares: Mapping[str, range] = MappingProxyType({}),
    *,
    whole: bool = True,
) -> None:
    """Load the state of what the optimizer steps by address, in place of any that it has.

    Args:
        path: The checkpoint.
        optimizer: The optimizer.
        parameters: What the model holds, by address.
        shares: The experts that it holds, for each address of which it holds not all.
        whole: Whether it holds all stages.

    Raises:
        CheckpointError: There is a state of a parameter that a model with all stages does not have.
    """
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    parts, state = Parts(path, "optimizer"), dict[Tensor, dict[str, object]]()
    for name in (*parts.keys(), *parts.values):
        address, _, key = name.rpartition("/")
        parameter = parameters.get(address)
        if parameter is None and whole:
            raise CheckpointError(f"{path}: the optimizer's state names {address}, which the experiment does not have")
        if parameter is None or parameter not in stepped:
            continue
        if name in parts.values:
            value: object = parts.values[name]
        else:
            per_expert = address in shares and len(parts.shape(name)) == parameter.ndim
            value = parts.read(name, shares[address] if per_expert else None)
            value = value.to(parameter.device) if value.ndim else value
        state.setdefault(parameter, {})[key] = value
    optimizer.state.clear()
    optimizer.state.update(state)


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

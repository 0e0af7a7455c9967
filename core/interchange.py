"""Models to and from the format of DeepSeek-V3's released weights, a few rows at a time."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from attrs import asdict, frozen

from tangram.core import checkpoint
from tangram.core.checkpoint import CheckpointError
from tangram.core.context import built
from tangram.core.contracts import State, Stateful, Tokenizer
from tangram.core.deepseek_config import BLOCK, read_config, read_tile, write_config
from tangram.core.deepseek_format import SCALE, Piece, Shape, pieces, shape_of, trees_of
from tangram.core.experiment import Experiment
from tangram.core.liveness import Liveness
from tangram.core.model import build_model
from tangram.core.parts import PartsReader
from tangram.core.presets import digest_anywhere, dump, load_preset, to_yaml
from tangram.core.process import versions
from tangram.core.provenance import RUN_PRESET, is_run, tell_changes
from tangram.core.records import Progress
from tangram.core.tensor_file import Spec, TensorWriter
from tangram.core.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from tangram.core.tokenizer_files import FILE as TOKENIZER
from tangram.core.tokenizer_files import token_ids, tokenizer_digest, tokenizer_of, write_json, write_tokenizer
from tangram.core.weight_folder import INDEX, InterchangeError, WeightFolder, batches, read_json
from tangram.kernels import quantize_blocks

SHARD_BYTES = 5_000_000_000


@frozen
class Written:
    """What an export wrote.

    Attributes:
        step: Steps that the run had taken.
        files: Files of weights.
        parameters: Numbers in them, copies and biases included, scales not.
        tokenizer: Whether there is one.
    """

    step: int
    files: int
    parameters: int
    tokenizer: bool


@frozen
class Read:
    """What an import read.

    Attributes:
        experiment: The run's experiment.
        depth: Blocks for multi-token prediction.
        tokenizer: Whether there was one.
    """

    experiment: Experiment
    depth: int
    tokenizer: bool


class FullDiskError(Exception):
    """A folder could not be written: the disk is full, or refuses; the message says what is wrong."""


@contextmanager
def _filling(folder: Path) -> Iterator[None]:
    """Give a new or empty folder to fill; if that fails, nothing of it is left.

    Raises:
        InterchangeError: It is there, and holds something.
        FullDiskError: It could not be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InterchangeError(f"{folder} is there already, and not an empty folder; choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | CheckpointError):
            why = error.__cause__ or error  # a checkpoint's own message speaks of others before it
            text = getattr(why, "strerror", None) or str(why)
            raise FullDiskError(f"{folder} could not be written: {text}; nothing of it is left") from error
        raise


# --- export -----------------------------------------------------------------------------------------------


def export(
    run: Path,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    fp8: bool = False,
    plugins: Sequence[str | Path] = (),
) -> Written:
    """Write the newest checkpoint of a run into a new or empty folder, config.json last.

    Args:
        run: The run directory.
        folder: Where to.
        shard_bytes: Most bytes of tensors in a file; a larger tensor has one for itself.
        fp8: Write the linears that the release has in FP8 as E4M3 codes, with a scale for each 128 x 128 block.
        plugins: Plugin files to load; those that a run names are not loaded on its word.

    Raises:
        ForeignCodeError: The run needs plugin files that are not in `plugins`.
        InterchangeError: There is no such run, its weights are not those of its preset, or the folder is not empty.
        FormatError: The format cannot say this model.
        CheckpointError: No checkpoint is whole.
        FullDiskError: The folder could not be written.
        BuildError: The tokenizer cannot be read, or is another one.
    """
    if not is_run(run):
        raise InterchangeError(f"{run} is no run directory: it has no {RUN_PRESET}")
    experiment = load_preset(run / RUN_PRESET, plugins=plugins)
    tell_changes(run, experiment)
    shape = shape_of(dump(experiment))
    found = checkpoint.newest(run / "checkpoints")
    if found is None:
        raise InterchangeError(f"{run} has no checkpoint yet")
    tokenizer = tokenizer_of(run, experiment, found.path)
    with _filling(folder), PartsReader(found.path, "model") as source:
        wanted = pieces(shape)
        _check_source(source, wanted)
        files = _write_shards(source, wanted, folder, shard_bytes, fp8)
        dtype = str(source.specs["embedding.weight"].dtype).removeprefix("torch.")
        _write_rest(folder, shape, tokenizer, dtype, fp8)
    numbers = sum(torch.Size(piece.shape).numel() for piece in wanted)
    return Written(found.step, files, numbers, tokenizer is not None)


def _check_source(source: PartsReader, wanted: Sequence[Piece]) -> None:
    """Refuse weights that are not exactly those that the pieces are made of."""
    sizes: dict[str, int] = {}
    for piece in wanted:
        if piece.address is not None and not piece.copied:
            sizes[piece.address] = sizes.get(piece.address, 0) + torch.Size(piece.shape).numel()
    here = {address: torch.Size(spec.shape).numel() for address, spec in source.specs.items()}
    wrong = [address for address in [*sizes, *here] if sizes.get(address) != here.get(address)]
    if wrong:
        counts = f"{here.get(wrong[0], 0)} numbers here, {sizes.get(wrong[0], 0)} in DeepSeek-V3's format"
        raise InterchangeError(f"{source.path}: {wrong[0]} has {counts}")


def _specs(source: PartsReader, piece: Piece, fp8: bool) -> dict[str, Spec]:
    """Return the tensors that a piece is in a file."""
    if fp8 and piece.quantised:
        blocks = tuple(-(-size // BLOCK) for size in piece.shape)
        codes = Spec(torch.float8_e4m3fn, piece.shape)
        return {piece.name: codes, piece.name + SCALE: Spec(torch.float32, blocks)}
    dtype = torch.float32 if piece.address is None else source.specs[piece.address].dtype
    return {piece.name: Spec(dtype, piece.shape)}


def _write_shards(source: PartsReader, wanted: Sequence[Piece], folder: Path, most: int, fp8: bool) -> int:
    shards, sizes = list[list[Piece]](), list[int]()
    for piece in wanted:
        size = sum(spec.nbytes for spec in _specs(source, piece, fp8).values())
        if not shards or sizes[-1] + size > most:
            shards.append([])
            sizes.append(0)
        shards[-1].append(piece)
        sizes[-1] += size
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    places: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        specs = {key: spec for piece in shard for key, spec in _specs(source, piece, fp8).items()}
        places |= dict.fromkeys(specs, name)
        with TensorWriter(folder / name, specs, {"format": "pt"}) as file:
            for piece in shard:
                _write_piece(source, piece, file, fp8)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": places})
    return len(shards)


def _write_piece(source: PartsReader, piece: Piece, file: TensorWriter, fp8: bool) -> None:
    whole = Spec(torch.float32, piece.shape)
    if piece.address is None:
        file.write(piece.name, torch.zeros(piece.shape))
        return
    for start, stop in batches(whole.rows, whole.columns, BLOCK):
        rows = source.read(piece.address, piece.start + start, piece.start + stop)
        if fp8 and piece.quantised:
            rows, scales = quantize_blocks(rows, BLOCK)
            file.write(piece.name + SCALE, scales, start // BLOCK)
        file.write(piece.name, rows, start)


def _write_rest(folder: Path, shape: Shape, tokenizer: Tokenizer | None, dtype: str, fp8: bool) -> None:
    tokens = token_ids(tokenizer)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, shape.length)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
    write_json(folder / "config.json", write_config(shape, dtype=dtype, fp8=fp8, tokens=tokens))


# --- import -----------------------------------------------------------------------------------------------


def import_model(folder: Path, out: Path, overrides: Sequence[str] = (), *, plugins: Sequence[str | Path] = ()) -> Read:
    """Make a folder in DeepSeek-V3's format a run that has taken no step, in a new or empty directory.

    Weights of any of the format's dtypes become float32. The optimizer's state is empty. What the format does not say,
    from the data to the learning rate, is this function's choice, and `overrides` may change it.

    Args:
        folder: The folder: config.json, weights in one file or in shards, and tokenizer.json if there is one.
        out: The run directory.
        overrides: Changes to the experiment, `dotted.path=value`.
        plugins: Plugin files to load, which the overrides may name.

    Raises:
        InterchangeError: A file is missing or broken, or `out` is not empty; a tensor is missing, unexpected or of
            another shape, with its file; an override changes the model.
        FormatError: The config says what we do not compute.
        ConfigError: An override is wrong.
        FullDiskError: The run directory could not be written.
        BuildError: The data cannot be built, with this tokenizer for example.
    """
    _refuse_what_is_no_model(folder)
    config = read_json(folder / "config.json")
    with ExitStack() as stack:
        weights = WeightFolder(folder, stack, read_tile(config))
        shape = read_config(config, weights.depth(config.get("num_hidden_layers")))
        wanted = pieces(shape)
        weights.check(wanted)
        tokenizer = folder / TOKENIZER
        home = out if tokenizer.exists() else None
        experiment = _experiment(shape, folder.resolve().name, home, overrides, plugins)
        stack.enter_context(_filling(out))
        if tokenizer.exists():
            for file in (TOKENIZER, TOKENIZER_CONFIG):  # the second has the chat template
                if (folder / file).exists():
                    shutil.copyfile(folder / file, out / file)
        _write_run(out, experiment, weights, wanted)
    return Read(experiment, shape.depth, tokenizer.exists())


def _refuse_what_is_no_model(folder: Path) -> None:
    if not folder.is_dir():
        raise InterchangeError(f"{folder} is no folder")
    if is_run(folder):
        raise InterchangeError(
            f"{folder} is a run already; `tangram export {folder} DIR` makes of it what can be imported"
        )
    if not (folder / "config.json").exists():
        raise InterchangeError(f"{folder} has no config.json, so it is no model in the format of DeepSeek-V3")


def _experiment(
    shape: Shape, name: str, out: Path | None, overrides: Sequence[str], plugins: Sequence[str | Path]
) -> Experiment:
    """Return an experiment of a shape; with `out`, trained further on text with the tokenizer that lies there."""
    model, objectives = trees_of(shape)
    data: Mapping[str, object] = {"use": "synthetic"}
    if out is not None:
        data = {"use": "text", "corpus": "python", "tokenizer": str((out / TOKENIZER).resolve())}
    length = min(shape.length, 4096)
    train = {"sequence_length": length, "batch_sequences": 8, "tokens": 1000 * 8 * length, "lr": 1e-5}
    laid = {
        "name": name,
        "model": model,
        "objectives": objectives,
        "precision": {"use": "full", "compute": "float32"},
        "data": data,
        "observers": {"wandb": None, "ema": None},
        "train": {**train, "checkpoint_every": 100},
        "parallel": {
            "pipeline": {"use": "sequential"},
            "pipeline_ranks": 1,
            "expert_ranks": 1,
            "sharding": {"use": "replicate"},
        },
    }
    settings = (f"{key}={json.dumps(value)}" for key, value in laid.items())
    experiment = load_preset("deepseek-v3", *settings, *overrides, plugins=plugins)
    if shape_of(dump(experiment)) != shape:
        raise InterchangeError("the changes reach into the model, which is what the folder says")
    return experiment


def _write_run(out: Path, experiment: Experiment, weights: WeightFolder, wanted: Sequence[Piece]) -> None:
    data = built("data", experiment.data.build, experiment.train, experiment.model.vocab_size)
    guard = built("guard", experiment.guard.build)
    files: dict[str, State] = {"optimizer": {}}
    if isinstance(guard, Stateful):
        files["guard"] = guard.state()
    state = {
        "progress": asdict(Progress()),
        "seconds": 0.0,
        "experiment": digest_anywhere(experiment),
        "data": data.fingerprint,
        "tokenizer": tokenizer_digest(data.tokenizer),
        "liveness": asdict(_liveness(weights, wanted)),
        "versions": versions(),
    }
    checkpoint.save(out / "checkpoints", 0, files, state, _model_writer(experiment, weights, wanted))
    (out / RUN_PRESET).write_text(to_yaml(experiment), encoding="utf-8")  # last: now it is a run


def _liveness(weights: WeightFolder, wanted: Sequence[Piece]) -> Liveness:
    """Return what a run remembers from its beginning: the biases of every layer with experts."""
    start = {}
    for piece in wanted:
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.gate\.e_score_correction_bias", piece.name):
            start[match[1]] = [float(value) for _, rows in weights.batches(piece) for value in rows.flatten()]
    return Liveness(start=start, trained=True, load={layer: [0] * len(biases) for layer, biases in start.items()})


def _model_writer(experiment: Experiment, weights: WeightFolder, wanted: Sequence[Piece]) -> Callable[[Path], None]:
    state = build_model(experiment, device="meta").state_dict()
    specs = {address: Spec(tensor.dtype, tuple(tensor.shape)) for address, tensor in state.items()}

    def write(folder: Path) -> None:
        with TensorWriter(folder / "model.safetensors", specs, {}) as file:
            for piece in wanted:
                if piece.address is not None and not piece.copied:
                    for start, rows in weights.batches(piece):
                        file.write(piece.address, rows.to(specs[piece.address].dtype), piece.start + start)

    return write

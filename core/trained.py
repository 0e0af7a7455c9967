"""A trained model by where it lies: what it is called and how it reads, and its weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from attrs import frozen

from tangram.core import checkpoint
from tangram.core.chat import Chat, chat_of
from tangram.core.contracts import Tokenizer
from tangram.core.deepseek_format import FormatError
from tangram.core.experiment import Experiment
from tangram.core.interchange import import_model
from tangram.core.model import Model, build_model
from tangram.core.parts import Parts
from tangram.core.presets import load_preset
from tangram.core.process import own_device
from tangram.core.provenance import RUN_PRESET, is_run
from tangram.core.run import load_run
from tangram.core.session import RunError
from tangram.core.speculation import drafter_of
from tangram.core.tokenizer_files import tokenizer_of
from tangram.core.weight_folder import InterchangeError


@frozen(eq=False)
class Offer:
    """What a trained model is for whoever asks it for texts.

    Attributes:
        name: What clients call it.
        tokenizer: Its tokenizer.
        vocab_size: Its tokens.
        length: Tokens of the sequences that it was trained on.
        chat: What makes prompts of conversations; none where its tokenizer has no tokens for them.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    length: int
    chat: Chat | None


@contextmanager
def as_run(path: Path, plugins: Sequence[Path]) -> Iterator[Path]:
    """Give a run directory: the one named, or for as long as needed one made of a folder in DeepSeek-V3's format.

    Raises:
        RunError: The folder cannot be read.
    """
    if not (path / "config.json").is_file() or is_run(path):
        yield path
        return
    with TemporaryDirectory(prefix="tangram-") as made:
        run = Path(made) / path.resolve().name
        try:
            import_model(path, run, plugins=plugins)
        except (InterchangeError, FormatError) as error:
            raise RunError(f"{path}: {error}") from None
        yield run


def load_offer(run: Path, plugins: Sequence[Path], *, speculate: bool) -> Offer:
    """Return what a run has to offer.

    Raises:
        RunError: There is no run, no checkpoint, no tokenizer, or nothing to draft with.
        BuildError: Its tokenizer cannot be read, or is another one.
        CheckpointError: No checkpoint is whole.
        ForeignCodeError: The run needs plugin files that are not in `plugins`.
    """
    experiment, folder = _found(run, plugins)
    tokenizer = tokenizer_of(run, experiment, folder)
    if tokenizer is None:
        raise RunError(f"{run} was trained on tokens that stand for no text; serve a run that has a tokenizer")
    if speculate:
        try:
            drafter_of(build_model(experiment, device="meta"))
        except ValueError as error:
            raise RunError(f"{run}: {error}") from None
    chat = chat_of(run, tokenizer)
    return Offer(experiment.name, tokenizer, experiment.model.vocab_size, experiment.train.sequence_length, chat)


def load_model(run: Path, plugins: Sequence[Path], *, averaged: bool = False) -> Model:
    """Return the model of a run, on a CPU its weights mapped from the file: several processes share their pages.

    Args:
        run: The run directory.
        plugins: Plugin files to load.
        averaged: Take the weights that an observer averaged, which are read by what trains.

    Raises:
        RunError: There is no run, or no checkpoint.
        CheckpointError: No checkpoint is whole, or it does not fit the model.
        ForeignCodeError: The run needs plugin files that are not in `plugins`.
    """
    if averaged:
        return load_run(run, averaged=True, plugins=plugins).model
    experiment, folder = _found(run, plugins)
    model = build_model(experiment, device="meta")
    parts = Parts(folder, "model")
    try:
        model.load_state_dict({key: parts.read(key) for key in parts.keys()}, assign=True)  # noqa: SIM118 (no mapping)
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"{folder}: the model does not fit the experiment: {error}") from None
    return model.to(own_device())


def _found(run: Path, plugins: Sequence[Path]) -> tuple[Experiment, Path]:
    if not is_run(run):
        raise RunError(f"{run} is no run directory: it has no {RUN_PRESET}")
    experiment = load_preset(run / RUN_PRESET, plugins=plugins)
    found = checkpoint.newest(run / "checkpoints")
    if found is None:
        raise RunError(f"{run} has no checkpoint yet")
    return experiment, found.path

"""The weights that a run starts from: those of another run instead of drawn ones, by address."""

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from attrs import frozen

from tangram.core import checkpoint
from tangram.core.checkpoint import CheckpointError, Found
from tangram.core.context import BuildError
from tangram.core.parts import Parts
from tangram.core.provenance import is_run
from tangram.core.step import Trainer
from tangram.core.tokenizer_files import tokenizer_digest


@frozen
class Start:
    """What a run started from, a JSON value.

    Attributes:
        checkpoint: The other run's checkpoint.
        manifest: SHA-256 of its manifest, which has the SHA-256 of every file.
        drawn: Objectives whose modules that run did not have: they begin with drawn weights.
        left: Objectives whose modules this run does not have.
    """

    checkpoint: str
    manifest: str
    drawn: tuple[str, ...]
    left: tuple[str, ...]


def source(directory: Path) -> Found:
    """Return the newest checkpoint of the run to start from.

    Raises:
        BuildError: There is no run, or it has no checkpoint that is whole.
    """
    if not is_run(directory):
        raise _refused(
            f"{directory} is no run directory: say which run's weights to start from with train.init_from=RUN; "
            "tangram import makes a run of released weights"
        )
    try:
        found = checkpoint.newest(directory / "checkpoints")
    except CheckpointError as error:
        raise _refused(str(error)) from None
    if found is None:
        raise _refused(f"{directory} has no checkpoint yet")
    return found


def start_from(run: Trainer, found: Found) -> Start:
    """Give the model a checkpoint's weights and expert biases: nothing else of that run, neither steps nor moments.

    The trunk has to be the same. An objective that has a module may be new, or gone.

    Raises:
        BuildError: The tokens mean something else, or the weights do not fit.
    """
    theirs = checkpoint.read_state(found.path).get("tokenizer")
    if theirs != tokenizer_digest(run.data.tokenizer):
        raise _refused(
            f"{found.path} was trained with another tokenizer, so its tokens mean something else; "
            "take its data, or its tokenizer with data.tokenizer"
        )
    layout, asked = run.parallel.layout, run.experiment.objectives
    there = _objectives(Parts(found.path, "model").keys())
    here = sorted(_objectives(run.model.state_dict()))
    drawn = set(run.parallel.groups.gather(here, range(layout.ranks))) - there
    left = there - asked.keys()
    try:
        checkpoint.load_model(
            found.path,
            run.model,
            run.sharding.rows(),
            whole=layout.pipeline_ranks == 1,
            but=tuple(f"objectives.{name}." for name in drawn | left),
        )
    except CheckpointError as error:
        raise _refused(str(error)) from None
    manifest = sha256((found.path / checkpoint.MANIFEST).read_bytes()).hexdigest()
    return Start(str(found.path), manifest, tuple(sorted(drawn)), tuple(sorted(left)))


def _objectives(addresses: Iterable[str]) -> set[str]:
    """Return the names of the objectives that have weights."""
    return {address.split(".")[1] for address in addresses if address.startswith("objectives.")}


def _refused(why: str) -> BuildError:
    return BuildError("train.init_from", why)

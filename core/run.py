"""A run: from a resolved preset to a directory with weights, metrics and a verdict on every piece."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from attrs import asdict

from tangram.core import checkpoint
from tangram.core.assembly import Seat, alone, assemble, refuse_unfit
from tangram.core.checkpoint import Found, Team
from tangram.core.config import Origin
from tangram.core.context import built
from tangram.core.contracts import Averaging
from tangram.core.evaluation import set_weights
from tangram.core.experiment import Experiment
from tangram.core.files import write_whole
from tangram.core.plugins import run_manager
from tangram.core.presets import digest, load_preset, to_yaml
from tangram.core.provenance import RUN_PRESET, is_run, tell_changes, used_files
from tangram.core.saver import Saver
from tangram.core.session import Outcome, RunError, Session
from tangram.core.start import source, start_from
from tangram.core.step import Trainer
from tangram.core.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from tangram.core.tokenizer_files import FILE as TOKENIZER


def directory_of(experiment: Experiment, out: str | Path | None) -> Path:
    """Return the run directory: `out`, or else runs/<name>-<hash>."""
    return Path(out) if out else Path("runs") / f"{experiment.name}-{digest(experiment)}"


def resumable(directory: str | Path) -> Found | None:
    """Return the newest checkpoint of a run that is whole; None where the run ended before it saved one.

    Only the process that will train may ask: it clears away what a crash left.

    Raises:
        RunError: There is no run.
        CheckpointError: There are checkpoints, and none is whole.
    """
    root = Path(directory) / "checkpoints"
    checkpoint.settle(root)
    found = checkpoint.newest(root)
    if found is None and not is_run(Path(directory)):
        raise RunError(f"{directory} holds no run to resume; leave out --resume to start one")
    return found


def train(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    resume: bool | Found = False,
    origins: Mapping[str, Origin] = MappingProxyType({}),
    seat: Seat | None = None,
) -> Outcome:
    """Train an experiment into a run directory, by default runs/<name>-<hash>.

    Args:
        experiment: The resolved preset.
        out: The run directory.
        resume: Go on from the newest checkpoint, or from this one; a run that has none begins again.
        origins: Where each leaf of the preset was written, for the report.
        seat: Which rank this process is, by default alone; all ranks see one directory.

    Raises:
        RunError: The directory holds another run, or nothing to resume.
        BuildError: A component refuses its surroundings, or the weights to start from do not fit.
        NonFiniteError: The guard stopped the run.
        RunInterruptedError: SIGINT or SIGTERM did; it stands in a checkpoint.
        CheckpointError: A checkpoint could not be written; those before it are whole.
    """
    directory, seat = directory_of(experiment, out), seat or alone()
    if seat.leads and not resume and is_run(directory):
        raise RunError(f"{directory} holds a run already; continue it with --resume or choose another --out")
    run = assemble(experiment, seat)
    observers = {name: built(f"observers.{name}", config.build) for name, config in experiment.observers.items()}
    session = _session(run, directory, observers)
    found = session.agreed(lambda: resumable(directory) if resume is True else resume or None)
    if found is not None:
        if seat.leads:
            tell_changes(directory, experiment)
        session.resume(found)
    if run.parallel.layout.pipeline_ranks > 1:
        refuse_unfit(run)
    if found is None:
        start = _started(session)
        session.begin()
        if seat.leads:
            directory.mkdir(parents=True, exist_ok=True)
            _keep_tokenizer(run, directory)
            write_whole(directory / RUN_PRESET, to_yaml(experiment))  # last: now it is a run
        session.note("about", session.about() | {"plugins": used_files(experiment), "start": start})
        session.note("origins", {path: str(origin) for path, origin in origins.items()})
    view = session.view()
    session.hooks.tangram_run_started(run=view)
    session.hooks.tangram_model_built(run=view, model=run.model)
    try:
        with session.interruption.watching():
            session.steps(view)
            outcome = session.finish(view)
    except BaseException as error:
        session.hooks.tangram_run_ended(run=view, error=error)
        raise
    finally:
        session.saver.close()
    session.hooks.tangram_run_ended(run=view, error=None)
    return outcome


def _keep_tokenizer(run: Trainer, directory: Path) -> None:
    """Write the tokenizer into the run's directory, with the chat template that the run it starts from may have."""
    if run.data.tokenizer is None:
        return
    write_whole(directory / TOKENIZER, run.data.tokenizer.to_json())
    named = run.experiment.train.init_from
    if named is not None and (config := Path(named).expanduser() / TOKENIZER_CONFIG).is_file():
        write_whole(directory / TOKENIZER_CONFIG, config.read_text(encoding="utf-8"))


def _started(session: Session) -> dict[str, object] | None:
    """Give the model the weights that it is to start from, if any; return what they are."""
    named = session.run.experiment.train.init_from
    if named is None:
        return None
    start = start_from(session.run, session.agreed(lambda: source(Path(named).expanduser())))
    if session.leads:
        for names, what in ((start.drawn, "not there: it begins with drawn weights"), (start.left, "left behind")):
            for name in names:
                warnings.warn(f"{start.checkpoint}: objectives.{name} is {what}", stacklevel=2)
    return asdict(start)


def load_run(path: str | Path, *, averaged: bool = False, plugins: Sequence[str | Path] = ()) -> Trainer:
    """Return the trainer of a run as its newest checkpoint left it.

    Args:
        path: The run directory.
        averaged: Give the model the averaged weights that an observer kept, instead of the last ones.
        plugins: Plugin files to load; those that a run names are not loaded on its word.

    Raises:
        ForeignCodeError: The run needs plugin files that are not in `plugins`.
        RunError: There is no run, no checkpoint, or no average.
        CheckpointError: No checkpoint is whole.
    """
    directory = Path(path)
    if not is_run(directory):
        raise RunError(f"{directory} is no run directory: it has no {RUN_PRESET}")
    experiment = load_preset(directory / RUN_PRESET, plugins=plugins)
    tell_changes(directory, experiment)
    built_ones = {name: built(f"observers.{name}", config.build) for name, config in experiment.observers.items()}
    observers = {name: observer for name, observer in built_ones.items() if isinstance(observer, Averaging)}
    if averaged and not observers:
        raise RunError(f"{directory} has no averaged weights: train with the observer ema (observers.ema={{}})")
    found = checkpoint.newest(directory / "checkpoints")
    if found is None:
        raise RunError(f"{directory} has no checkpoint yet")
    session = _session(assemble(experiment, trains=False), directory, observers if averaged else {})
    session.resume(found)
    if averaged:
        set_weights(session.run.model, next(iter(observers.values())).averaged())
    return session.run


def _session(run: Trainer, directory: Path, observers: Mapping[str, object]) -> Session:
    train, groups, layout = run.experiment.train, run.parallel.groups, run.parallel.layout
    everyone, team = range(layout.ranks), None
    if layout.ranks > 1:  # files are written in a thread, beside the messages of the steps
        aside = groups.aside()
        team = Team(layout.rank, layout.ranks, lambda said: groups.gather(said, everyone, aside))
        if layout.rank:
            observers = {name: each for name, each in observers.items() if isinstance(each, Averaging)}
    saver = Saver(directory / "checkpoints", train.keep_last, train.keep_every, team)
    return Session(run, directory, observers, run_manager(observers).hook, saver)

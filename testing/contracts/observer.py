"""What every observer owes: a run that is watched is the same run, bit for bit; what it remembers survives a crash."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor

from tangram.core import checkpoint
from tangram.core.assembly import Seat, assemble
from tangram.core.contracts import State, Stateful
from tangram.core.plugins import run_manager
from tangram.core.records import EvalReport, StepReport
from tangram.core.session import RunView
from tangram.core.step import Trainer, train_step
from tangram.testing.laws import Contract, law
from tangram.testing.mutants import observer as mutants
from tangram.testing.small import small_experiment

_STEPS = 4


class ObserverContract(Contract):
    """The laws of the slot `observer`."""

    slot = "observer"
    optional: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def make(cls, config: Any) -> object:
        """Return what the config builds."""
        return config.build()

    @law(kills=[mutants.misspells_a_hook])
    def its_hooks_exist(self, config: Any) -> None:
        """It watches one moment of a run at least, and none that no run has."""
        observer = self.make(config)
        manager = run_manager({"tried": observer})
        assert manager.get_hookcallers(observer), "it has no hook, marked by @HOOKIMPL"

    @law(kills=[mutants.moves_a_weight, mutants.draws_a_number])
    def a_run_that_is_watched_is_the_same_run(self, config: Any) -> None:
        """With it a run leaves the same weights, optimizer state and random numbers as without it, bit for bit."""
        unwatched, process = _unwatched(self.device), _process()
        torch.manual_seed(0)
        run = _run(self.device)
        with _watched(self.make(config), run) as tell:
            _take(run, _STEPS, tell)
        watched = _left_by(run)
        assert _process() == process, f"it leaves {_process()} for {process}"
        assert unwatched.keys() == watched.keys(), "it adds to the run or takes away from it"
        differing = [name for name, value in unwatched.items() if not _equal(value, watched[name])]
        assert not differing, f"with it {', '.join(differing[:3])} differ, {len(differing)} in all"

    @law(kills=[mutants.forgets_its_state])
    def resumed_it_remembers_what_it_saw(self, config: Any) -> None:
        """If it has state, a checkpoint brings it back: resumed in the midst of a run it ends in the same state."""
        whole, first, second = (self.make(config) for _ in range(3))
        if not (isinstance(whole, Stateful) and isinstance(first, Stateful) and isinstance(second, Stateful)):
            return
        run = _run(self.device)
        with TemporaryDirectory() as folder, _watched(whole, run) as tell_whole:
            with _watched(first, run) as tell:
                _take(run, _STEPS // 2, tell_whole, tell)
                saved = checkpoint.save(Path(folder), run.progress.step, {"tried": first.state()}, {})
            second.load_state(checkpoint.read_file(saved, "tried"))
            with _watched(second, run) as tell:
                _take(run, _STEPS - _STEPS // 2, tell_whole, tell)
                expected, resumed = whole.state(), second.state()
                assert resumed.keys() == expected.keys(), "resumed it has other state"
                differing = [name for name, value in expected.items() if not _equal(value, resumed[name])]
                assert not differing, f"resumed, {', '.join(differing[:3])} of its state differs"


def _run(device: str) -> Trainer:
    """Return a run that begins."""
    return assemble(small_experiment("train.micro_sequences=2"), Seat(device=torch.device(device)))


def _take(run: Trainer, steps: int, *tell: Callable[[StepReport], None]) -> None:
    """Take steps of a run, and tell those who watch of each."""
    for _ in range(steps):
        report = train_step(run, run.data.batch(run.progress, 2))
        for each in tell:
            each(report)


@contextmanager
def _watched(observer: object, run: Trainer) -> Iterator[Callable[[StepReport], None]]:
    """Have a run watched in all its moments; yield what tells the observer of a step."""
    hooks = run_manager({"tried": observer}).hook
    with TemporaryDirectory() as folder:
        view = RunView(run.experiment, Path(folder), run.progress, {}, 0)

        def tell(report: StepReport) -> None:
            hooks.tangram_step_ended(run=view, report=report)
            losses = EvalReport(run.progress, report.result.losses, 2.0, 12, 12, complete=False)
            hooks.tangram_evaluated(run=view, report=losses)
            hooks.tangram_checkpoint_saved(run=view, path=Path(folder))

        hooks.tangram_run_started(run=view)
        hooks.tangram_model_built(run=view, model=run.model)
        yield tell
        hooks.tangram_run_ended(run=view, error=None)


@cache
def _unwatched(device: str) -> State:
    """Return what a run leaves that nobody watches."""
    torch.manual_seed(0)
    run = _run(device)
    _take(run, _STEPS)
    return _left_by(run)


def _left_by(run: Trainer) -> State:
    """Return all that a run leaves, under flat names."""
    addresses = {parameter: address for address, parameter in run.model.named_parameters()}
    others = {"random numbers": torch.random.get_rng_state(), "progress": str(run.progress)}
    return {**run.model.state_dict(), **checkpoint.optimizer_state(run.optimizer, addresses), **others}


def _process() -> str:
    """Return what a run finds in the process, and leaves as it was."""
    gradients = "with" if torch.is_grad_enabled() else "without"
    return f"{torch.get_default_dtype()}, {torch.get_num_threads()} threads, {gradients} gradients"


def _equal(one: Tensor | float | str, other: Tensor | float | str) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other

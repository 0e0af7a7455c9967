"""What every observer owes: a run that is watched is the same run, bit for bit; what it remembers survives a crash."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor

from tangram.core import checkpoint
from tangram.core.assembly import assemble
from tangram.core.contracts import State, Stateful
from tangram.core.plugins import run_manager
from tangram.core.records import EvalReport
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
        left = []
        for observers in ({}, {"tried": self.make(config)}):
            torch.manual_seed(0)
            run = assemble(small_experiment())
            _watch(observers, run, _STEPS)
            left.append(_left_by(run))
        assert left[0].keys() == left[1].keys(), "it adds to the run or takes away from it"
        differing = [name for name, value in left[0].items() if not _equal(value, left[1][name])]
        assert not differing, f"with it {', '.join(differing[:3])} differ, {len(differing)} in all"

    @law(kills=[mutants.forgets_its_state])
    def resumed_it_remembers_what_it_saw(self, config: Any) -> None:
        """If it has state, a checkpoint brings it back: resumed in the midst of a run it ends in the same state."""
        first = self.make(config)
        if not isinstance(first, Stateful):
            return
        whole = _watch({"tried": self.make(config)}, assemble(small_experiment()), _STEPS)
        run = assemble(small_experiment())
        with TemporaryDirectory() as folder:
            saved = checkpoint.save(Path(folder), 2, {"tried": _watch({"tried": first}, run, 2)}, {})
            second = self.make(config)
            assert isinstance(second, Stateful)
            second.load_state(checkpoint.read_file(saved, "tried"))
        resumed = _watch({"tried": second}, run, _STEPS - 2)
        assert resumed.keys() == whole.keys(), "resumed it has other state"
        differing = [name for name, value in whole.items() if not _equal(value, resumed[name])]
        assert not differing, f"resumed, {', '.join(differing[:3])} of its state differs"


def _watch(observers: Mapping[str, object], run: Trainer, steps: int) -> State:
    """Take steps of a run that is watched in all its moments; return the state of the observer, if it has any."""
    hooks = run_manager(observers).hook
    with TemporaryDirectory() as folder:
        view = RunView(run.experiment, Path(folder), run.progress, {}, 0)
        hooks.tangram_run_started(run=view)
        hooks.tangram_model_built(run=view, model=run.model)
        for _ in range(steps):
            report = train_step(run, run.data.batch(run.progress, 2))
            hooks.tangram_step_ended(run=view, report=report)
            losses = EvalReport(run.progress, report.result.losses, 2.0, 12, 12, complete=False)
            hooks.tangram_evaluated(run=view, report=losses)
            hooks.tangram_checkpoint_saved(run=view, path=Path(folder))
        state: dict[str, Tensor | int | float | str] = {}
        for observer in observers.values():
            if isinstance(observer, Stateful):
                held = observer.state().items()
                state |= {key: value.clone() if isinstance(value, Tensor) else value for key, value in held}
        hooks.tangram_run_ended(run=view, error=None)
    return state


def _left_by(run: Trainer) -> State:
    """Return all that a run leaves in the process, under flat names."""
    addresses = {parameter: address for address, parameter in run.model.named_parameters()}
    process = {
        "random numbers": torch.random.get_rng_state(),
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "gradients enabled": int(torch.is_grad_enabled()),
        "progress": str(run.progress),
    }
    return {**run.model.state_dict(), **checkpoint.optimizer_state(run.optimizer, addresses), **process}


def _equal(one: Tensor | float | str, other: Tensor | float | str) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other

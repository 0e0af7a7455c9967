"""The moving average of the parameters, on the CPU and beside the run (arXiv:2412.19437, section 3.2.3)."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from attrs import field, frozen
from attrs.validators import ge, lt
from torch import Tensor

from tangram.core.contracts import State
from tangram.core.hookspecs import HOOKIMPL
from tangram.core.model import Model
from tangram.core.records import StepReport, Verdict
from tangram.core.registry import component


@component("observer", use="ema")
@frozen(kw_only=True)
class EMAConfig:
    """Keep an exponential moving average of the parameters on the CPU, in every checkpoint.

    Attributes:
        decay: What remains of the average at each step; it looks back on about 1 / (1 - decay) steps.
    """

    decay: float = field(default=0.999, validator=[ge(0.0), lt(1.0)])

    def build(self) -> "EMA":
        """Build it."""
        return EMA(self.decay)


class EMA:
    """Averages in float32, in a thread of its own, while the next step runs.

    The average begins as the initial weights. A step copies the parameters to a snapshot and goes on; it waits only
    for the update of the step before, if that still runs. Expert biases are no parameters and are not averaged.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._parameters: Mapping[str, Tensor] = {}
        self._snapshot: Mapping[str, Tensor] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._update: Future[None] | None = None

    @HOOKIMPL
    def tangram_model_built(self, model: Model) -> None:
        """Begin with the model's weights, unless a checkpoint gave an average."""
        self._parameters = {address: parameter.detach() for address, parameter in model.named_parameters()}
        self._snapshot = {a: torch.empty_like(p, device="cpu") for a, p in self._parameters.items()}
        if not self._average:
            self._average = {a: p.to("cpu", torch.float32, copy=True) for a, p in self._parameters.items()}

    @HOOKIMPL
    def tangram_step_ended(self, report: StepReport) -> None:
        """Hand the weights of an accepted step to the worker; an error of its last update is raised here."""
        self._wait()
        if report.verdict is not Verdict.ACCEPT:
            return
        for address, parameter in self._parameters.items():
            self._snapshot[address].copy_(parameter)
        self._update = self._worker.submit(self._take_in)

    @HOOKIMPL
    def tangram_run_ended(self) -> None:
        """End the worker."""
        self._worker.shutdown()

    def averaged(self) -> Mapping[str, Tensor]:
        """Return the average by address, float32, once it is up to date."""
        self._wait()
        return self._average

    def state(self) -> State:
        """Return the average."""
        return self.averaged()

    def load_state(self, state: State) -> None:
        """Go on from an average."""
        self._wait()
        self._average = {address: value for address, value in state.items() if isinstance(value, Tensor)}

    def _take_in(self) -> None:
        for address, weights in self._snapshot.items():
            self._average[address].lerp_(weights.float(), 1 - self.decay)

    def _wait(self) -> None:
        pending, self._update = self._update, None
        if pending is not None:
            pending.result()

"""Did each named piece do anything? Two well-known systems shipped DeepSeek-V3 with one of them silently off."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

import torch
from attrs import define, field, frozen

from tangram.core.model import Model
from tangram.core.records import Batch, Carry, Progress, StepReport, Verdict, violation

WINDOW = 20
"""Steps at either end of a run whose losses are compared."""

MIN_STEPS = 100
"""A shorter run is too short to tell."""


@frozen
class Piece:
    """One named piece of the preset.

    Attributes:
        name: Its dotted path.
        alive: Whether it had an effect; None where the run was too short to tell.
        why: What was seen.
    """

    name: str
    alive: bool | None
    why: str


@define(eq=False)
class Liveness:
    """Watches a run and judges its pieces at the end; it changes nothing. Its fields are JSON values.

    Attributes:
        steps: Steps seen.
        first: The first losses of each objective, up to `WINDOW`.
        last: The last ones.
        weight: Largest weight that each objective has had.
        violated: Largest load violation of each layer (as a string) with a balancer.
        start: The expert biases that those layers began with.
        load: Tokens per expert of each layer (as a string) with a router, over all accepted steps.
        trained: Whether the weights were trained before: then a loss need not fall.
    """

    steps: int = 0
    first: dict[str, list[float]] = field(factory=dict)
    last: dict[str, list[float]] = field(factory=dict)
    weight: dict[str, float] = field(factory=dict)
    violated: dict[str, float] = field(factory=dict)
    start: dict[str, list[float]] = field(factory=dict)
    load: dict[str, list[int]] = field(factory=dict)
    trained: bool = False

    def begin(self, experts: Sequence[int], biases: Mapping[int, list[float]], *, trained: bool = False) -> None:
        """Remember what the run starts with.

        Args:
            experts: Routed experts of each layer; 0 where there is no router.
            biases: The expert biases of each layer whose balancer moves them.
            trained: Whether the weights were trained before.
        """
        self.trained = trained
        self.start = {str(layer): biases[layer] for layer in sorted(biases)}
        self.load = {str(layer): [0] * n_experts for layer, n_experts in enumerate(experts) if n_experts}

    def observe(self, report: StepReport, weights: Mapping[str, float]) -> None:
        """Take in one step."""
        self.steps += 1
        for name, value in weights.items():
            self.weight[name] = max(self.weight.get(name, 0.0), value)
        if report.verdict is not Verdict.ACCEPT:
            return
        for name, value in report.result.losses.items():
            early = self.first.setdefault(name, [])
            if len(early) < WINDOW:
                early.append(value)
            self.last[name] = [*self.last.get(name, ()), value][-WINDOW:]
        for layer, biases in self.start.items():
            worst = float(violation(report.result.load[int(layer), : len(biases)]))
            self.violated[layer] = max(self.violated.get(layer, 0.0), worst)
        for layer, sums in self.load.items():
            counts: list[int] = report.result.load[int(layer), : len(sums)].tolist()
            self.load[layer] = [old + new for old, new in zip(sums, counts, strict=True)]

    def judge(self, model: Model, batch: Batch, now: Progress) -> list[Piece]:
        """Return what became of each objective and balancer; `batch` is a micro-batch to take gradients on."""
        if self.steps < MIN_STEPS:
            return self.unjudged(model, now, f"{self.steps} steps are too few to tell; {MIN_STEPS} are needed")
        gradients = objective_gradients(model, batch, now)
        token = {name for name, _ in model.token_objectives()}
        pieces = [self._objective(name, gradients.get(name), name in token) for name in model.weights(now)]
        return pieces + [self._balance(str(layer), bias.tolist()) for layer, bias in model.biases().items()]

    def unjudged(self, model: Model, now: Progress, why: str) -> list[Piece]:
        """Return that nothing can be said of any piece, and why."""
        names = [f"objectives.{name}" for name in model.weights(now)]
        return [Piece(name, None, why) for name in names + [self._balancer(layer) for layer in self.start]]

    def _objective(self, name: str, gradient: float | None, token: bool) -> Piece:
        path = f"objectives.{name}"
        if not self.weight.get(name):
            return Piece(path, False, "its weight was 0 all along")
        if gradient is not None and not gradient > 0:
            return Piece(path, False, "its loss has no gradient")
        if not token:
            return Piece(path, True, f"gradient norm {gradient:.2g}" if gradient is not None else "it had a weight")
        early, late = self.first.get(name, []), self.last.get(name, [])
        if not early:
            return Piece(path, False, "no step was accepted")
        fall = fmean(early) - fmean(late)
        noise = math.sqrt((_variance(early) + _variance(late)) / WINDOW)
        why = f"loss {fmean(early):.3f} -> {fmean(late):.3f}"
        alive = self.trained or fall > 2 * noise
        return Piece(path, alive, why if alive else f"{why}: it did not fall")

    def _balance(self, layer: str, bias: list[float]) -> Piece:
        path, worst = self._balancer(layer), self.violated.get(layer, 0.0)
        if bias == self.start[layer] and worst > 0:
            return Piece(path, False, f"the biases never moved under a load violation of {worst:.2f}")
        return Piece(path, True, f"largest bias {max(map(abs, bias)):.3g}")

    @staticmethod
    def _balancer(layer: str) -> str:
        return f"balancer of layer {layer}"


def _variance(values: list[float]) -> float:
    """Return the variance around the trend, from the differences of neighbours."""
    return fmean((b - a) ** 2 for a, b in pairwise(values)) / 2 if len(values) > 1 else 0.0


def objective_gradients(model: Model, batch: Batch, now: Progress) -> dict[str, float]:
    """Return the gradient norm of each loss that runs at `now`, alone; 0 where a loss has no gradient."""
    carry: Carry = model(batch, now)
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = {}
    for name, loss in carry.losses:
        if not loss.value.requires_grad:
            norms[name] = 0.0
            continue
        grads = torch.autograd.grad(loss.value, parameters, retain_graph=True, allow_unused=True)
        norms[name] = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads if grad is not None))
    return norms

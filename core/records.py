"""The values that pass between the pieces. All are frozen; nothing here computes a loss or a weight.

Letters: B sequences, S positions, D model, E experts, K experts per token, N tokens (B * S), M rows after dispatch.
"""

import math
from collections.abc import Callable, Mapping
from enum import Enum
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from attrs import evolve, field, frozen
from torch import Tensor

IGNORE = -100
"""The target at which no token loss is taken."""


@frozen
class Progress:
    """How far a run has come. Every curve and the data stream are functions of it; no component counts steps.

    Attributes:
        step: Optimizer steps taken.
        tokens: Tokens consumed.
        sequences: Sequences consumed, the cursor of the data stream.
        skipped: Cursors at which batches begin that the run was rolled back for and passes over.
    """

    step: int = 0
    tokens: int = 0
    sequences: int = 0
    skipped: tuple[int, ...] = ()

    def after(self, batch: "Batch") -> "Progress":
        """Return the progress once the whole (global) `batch` has been consumed."""
        return evolve(
            self,
            step=self.step + 1,
            tokens=self.tokens + batch.n_sequences * batch.tokens.shape[1],
            sequences=self.sequences + batch.n_sequences,
        )


@frozen(eq=False)
class Batch:
    """Packed sequences and what is to be predicted.

    The two counts are global: they are known before backward, and every slice keeps them, so that a loss which
    is a sum divided by a global count does not depend on how the batch was cut.

    Attributes:
        tokens: Input tokens, int64 [B, S].
        targets: The next token, or `IGNORE`, int64 [B, S]; None when decoding.
        positions: Position inside the document (isolated) or the row, int64 [B, S].
        segments: Number of the document inside the row, not decreasing along S, int64 [B, S]. Attention and
            multi-token prediction do not cross from one segment to another.
        n_targets: Targets that are not `IGNORE` in the global batch.
        n_sequences: Sequences in the global batch.
    """

    tokens: Tensor
    targets: Tensor | None
    positions: Tensor
    segments: Tensor
    n_targets: int
    n_sequences: int

    def rows(self, start: int, stop: int) -> "Batch":
        """Return the sequences `start` to `stop`; the global counts stay."""
        cut = slice(start, stop)
        return evolve(
            self,
            tokens=self.tokens[cut],
            targets=None if self.targets is None else self.targets[cut],
            positions=self.positions[cut],
            segments=self.segments[cut],
        )

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return evolve(
            self,
            tokens=self.tokens.to(device),
            targets=None if self.targets is None else self.targets.to(device),
            positions=self.positions.to(device),
            segments=self._segments_on(device),
        )

    def _segments_on(self, device: torch.device) -> Tensor:
        if self.segments.numel() and not any(self.segments.stride()):
            return self.segments[0, 0].to(device).expand_as(self.segments)  # still one number
        return self.segments.to(device)

    def micro(self, index: int, count: int) -> "Batch":
        """Return micro-batch `index` of `count` equal ones.

        Raises:
            ValueError: `count` does not divide the number of sequences.
        """
        size, rest = divmod(len(self.tokens), count)
        if rest:
            raise ValueError(f"{len(self.tokens)} sequences do not divide into {count} micro-batches")
        return self.rows(index * size, (index + 1) * size)


def one_document(tokens: Tensor) -> Tensor:
    """Return the segments of tokens [B, S] of which each row is one document, int64 [B, S].

    It is one number, expanded: who reads the strides need not ask a device whether there are documents.
    """
    return torch.zeros((), dtype=torch.int64, device=tokens.device).expand(tokens.shape)


@frozen(eq=False)
class RouterStats:
    """What a router did, per sequence.

    Attributes:
        ids: Chosen experts, int64 [B, S, K].
        load: How often each expert was chosen, int64 [B, E].
        top: How often each expert stands among the K best unbiased affinities, without bias or groups, int64
            [B, E] (arXiv:2412.19437, equation 18).
        affinity: Mean over the sequence of the affinities normalised over all experts, with gradient, [B, E]
            (equations 19 and 20).
    """

    ids: Tensor
    load: Tensor
    top: Tensor
    affinity: Tensor


@frozen(eq=False)
class Routing:
    """A router's decision for N tokens.

    Attributes:
        ids: Chosen experts, distinct in a row, int64 [N, K].
        gates: Weight of each chosen expert's output, with gradient, at least float32 [N, K].
        stats: The same, counted per sequence.
    """

    ids: Tensor
    gates: Tensor
    stats: RouterStats


@frozen(eq=False)
class Rows:
    """Tokens as the experts see them.

    Attributes:
        rows: One row for each (token, expert) pair that this rank computes, sorted by expert, [M, D].
        counts: Rows of each local expert, int64 [experts of this rank].
        handle: What `combine` needs to send the rows home. It carries no gradient.
    """

    rows: Tensor
    counts: Tensor
    handle: object


@frozen(eq=False)
class Dispatched:
    """A feed-forward between two of its phases.

    Attributes:
        hidden: The feed-forward's input until it was sent, [B, S, D]; afterwards kept only if still needed.
        routing: The router's decision; None where there is no router. Its gates are used when outputs come home.
        rows: The rows after dispatch, and after compute their outputs.
        shared: Output of what every token passes through, [B, S, D].
    """

    hidden: Tensor | None = None
    routing: Routing | None = None
    rows: Rows | None = None
    shared: Tensor | None = None


class FeedForwardOut(NamedTuple):
    """Output of a feed-forward: hidden [B, S, D], and the router's statistics if it has one."""

    hidden: Tensor
    stats: RouterStats | None


@frozen(eq=False)
class Loss:
    """One loss of one micro-batch: a sum over it, divided by the global count; unweighted.

    Attributes:
        value: Scalar with gradient, at least float32.
    """

    value: Tensor


@frozen(eq=False)
class Carry:
    """All that passes from one phase to the next.

    Attributes:
        hidden: The residual stream, [B, S, D].
        trunk: The residual stream after the last block, set once the blocks are done, [B, S, D].
        dispatched: The feed-forward under way.
        stats: Router statistics so far, each with its layer (n_layers + k for the k-th MTP block, from 0).
        losses: Losses so far, each under its objective's name.
    """

    hidden: Tensor | None = None
    trunk: Tensor | None = None
    dispatched: Dispatched | None = None
    stats: tuple[tuple[int, RouterStats], ...] = ()
    losses: tuple[tuple[str, Loss], ...] = ()


class Phase(NamedTuple):
    """A piece of a forward. `lane` says whether it computes or communicates, so that two can run side by side."""

    name: str
    lane: Literal["compute", "comm"]
    fn: Callable[[Carry], Carry]


@frozen(eq=False)
class Result:
    """What the executor brings back from one batch.

    Attributes:
        losses: Unweighted losses of the global batch, nats per target (or per sequence, as the objective says).
        total: Sum of the losses, each times its weight.
        load: Tokens per expert, int64 [layers + MTP blocks, largest E]; zero rows where a layer has no router.
        peak_live: Most micro-batches whose activations were alive at once.
    """

    losses: Mapping[str, float]
    total: float
    load: Tensor
    peak_live: int


@frozen
class GradientNorm:
    """The global gradient norm before clipping.

    Attributes:
        value: L2 norm over all parameters, each counted once.
        broken: Addresses of gradients that are not finite; empty when `value` is finite.
    """

    value: float
    broken: tuple[str, ...] = ()


def culprit_of(result: Result, norm: GradientNorm) -> str:
    """Return which loss or gradient is not finite, in words; empty when all are."""
    for name, value in result.losses.items():
        if not math.isfinite(value):
            return f"loss {name} is {value}"
    if norm.broken:
        more = f" and {len(norm.broken) - 1} more" if len(norm.broken) > 1 else ""
        return f"the gradient of {norm.broken[0]}{more} is not finite"
    return "" if math.isfinite(norm.value) else f"the gradient norm is {norm.value}"


class Verdict(Enum):
    """A guard's word on a step."""

    ACCEPT = "accept"
    SKIP = "skip"
    ROLLBACK = "rollback"


def violation(load: Tensor) -> Tensor:
    """Return (max - mean) / mean of `load` [..., E] over the experts, float64 [...]; zero where nothing was routed.

    MaxVio of arXiv:2408.15664, section 4.1.
    """
    counts = load.double()
    mean = counts.mean(-1)
    return torch.where(mean > 0, (counts.amax(-1) - mean) / mean.clamp_min(1e-300), torch.zeros_like(mean))


@frozen(eq=False)
class StepReport:
    """One optimizer step as observers see it.

    Attributes:
        now: Progress when the step began.
        after: Progress when it ended; of a rollback, the checkpoint's, to which the run went back.
        lr: Learning rate of the step.
        result: What the executor brought back.
        norm: The gradient norm before clipping.
        verdict: The guard's word.
        routed: Experts of each layer (row of `result.load`) that has a router.
        biases: Largest absolute expert bias after the step, of each layer whose balancer moves them.
        seconds: Wall seconds of the run up to the end of the step, what came before a resume included.
        tokens_per_second: Tokens of this step over its wall seconds.
    """

    now: Progress
    after: Progress
    lr: float
    result: Result
    norm: GradientNorm
    verdict: Verdict
    routed: Mapping[int, int] = field(factory=dict)
    biases: Mapping[int, float] = field(factory=dict)
    seconds: float = 0.0
    tokens_per_second: float = 0.0

    @classmethod
    def of(
        cls, now: Progress, batch: Batch, lr: float, result: Result, norm: GradientNorm, verdict: Verdict
    ) -> "StepReport":
        """Return the report of a step; the loop that runs steps adds what only it knows."""
        return cls(now, now.after(batch), lr, result, norm, verdict)

    @property
    def violations(self) -> dict[int, float]:
        """Load violation of each layer with a router."""
        return {layer: float(violation(self.result.load[layer, :n])) for layer, n in self.routed.items()}

    @property
    def violation(self) -> float:
        """Mean of `violations`; nan without a router."""
        return fmean(self.violations.values()) if self.routed else math.nan

    @property
    def culprit(self) -> str:
        """Which loss or gradient is not finite, in words, or else the loss that the guard did not bear."""
        if self.verdict is Verdict.ACCEPT:
            return ""
        return culprit_of(self.result, self.norm) or f"the loss was {self.result.total:.4g}"

    def metrics(self) -> dict[str, float | int | str]:
        """Return the row of metrics.jsonl: flat, one value a name; `step` and `tokens` as they stand after the step."""
        row: dict[str, float | int | str] = {
            "step": self.after.step,
            "tokens": self.after.tokens,
            "seconds": self.seconds,
            "loss": self.result.total,
        }
        row |= {f"loss.{name}": value for name, value in self.result.losses.items()}
        row |= {
            "lr": self.lr,
            "grad_norm": self.norm.value,
            "tokens_per_second": self.tokens_per_second,
            "verdict": self.verdict.value,
        }
        if self.routed:
            row |= {"violation": self.violation} | _by_layer("violation", self.violations)
        if self.biases:
            row |= {"bias": max(self.biases.values())} | _by_layer("bias", self.biases)
        if self.verdict is not Verdict.ACCEPT:
            row["culprit"] = self.culprit
        if self.verdict is Verdict.ROLLBACK:
            row["skipped"] = self.now.sequences
        return row


def _by_layer(name: str, values: Mapping[int, float]) -> dict[str, float]:
    """Return a column for each layer, in six digits: with sixty layers they are most of the row."""
    return {f"{name}.{layer}": float(f"{value:.6g}") for layer, value in values.items()}


@frozen(eq=False)
class EvalReport:
    """One pass over held-out text.

    Attributes:
        now: Progress when it was taken.
        losses: Unweighted losses, nats per target.
        bits_per_byte: Nats of next_token over all targets seen / ln 2 / UTF-8 bytes seen; None without bytes.
        n_targets: Targets seen.
        n_bytes: UTF-8 bytes of the text seen.
        complete: Whether all held-out text was seen.
        measures: What modules said of their arithmetic on the first micro-batch: by name, the largest of each layer.
    """

    now: Progress
    losses: Mapping[str, float]
    bits_per_byte: float | None
    n_targets: int
    n_bytes: int
    complete: bool
    measures: Mapping[str, Mapping[int, float]] = field(factory=dict)

    def metrics(self) -> dict[str, float | int | bool]:
        """Return the evaluation's row of metrics.jsonl."""
        row: dict[str, float | int | bool] = {"step": self.now.step, "tokens": self.now.tokens}
        row |= {f"eval.loss.{name}": value for name, value in self.losses.items()}
        if self.bits_per_byte is not None:
            row["eval.bits_per_byte"] = self.bits_per_byte
        for name, values in self.measures.items():
            row |= _by_layer(f"eval.{name}", values)
        return row | {
            "eval.targets": self.n_targets,
            "eval.bytes": self.n_bytes,
            "eval.complete": self.complete,
        }

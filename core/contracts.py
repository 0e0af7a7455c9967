"""What each slot promises. A component is a marked attrs config class whose `build` makes one of these.

Slots that live inside the model are abstract `nn.Module`s; the others are Protocols. Statistics and losses are
returned, never stored: the one argument that a forward writes is a cache.

Letters: B sequences, S positions, D model, H heads, E experts, K experts per token, N tokens (B * S), M rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from tangram.core.curve import Curve
from tangram.core.records import (
    Batch,
    Carry,
    Dispatched,
    FeedForwardOut,
    GradientNorm,
    Loss,
    Phase,
    Progress,
    Result,
    RouterStats,
    Routing,
    Rows,
    Verdict,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tangram.core.context import Context, Parallel
    from tangram.core.experiment import BlockConfig, TrainConfig
    from tangram.core.model import Model
    from tangram.core.plan import Plan
    from tangram.core.simulator import Costs

Input: TypeAlias = Literal["plain", "attention", "dispatched"]
"""What a linear is fed: the attention output, rows that were dispatched to experts, or anything else. A precision
may scale each differently (arXiv:2412.19437, section 3.3.2)."""

State: TypeAlias = Mapping[str, Tensor | int | float | str]
"""What a `Stateful` thing writes into a checkpoint: tensors and plain values under flat names."""


@runtime_checkable
class Stateful(Protocol):
    """Anything that must survive a crash: a component or an observer with state of its own."""

    def state(self) -> State:
        """Return the state to write."""
        ...

    def load_state(self, state: State) -> None:
        """Take back what `state` returned."""
        ...


@runtime_checkable
class Averaging(Protocol):
    """An observer that keeps an average of the weights; the run is evaluated with it at its end.

    Of several ranks each has one for what it holds, and writes of its state what stands under these addresses.
    """

    def averaged(self) -> Mapping[str, Tensor]:
        """Return the average of every parameter by its address."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A module of the model that can say how well its arithmetic holds its inputs; evaluations ask it for one batch.

    Attributes:
        layer: The block that it is in.
    """

    layer: int

    def measures(self, *inputs: Tensor) -> Mapping[str, float]:
        """Return quantities of which the largest of a layer is worth seeing, by name."""
        ...


# --- inside the model -------------------------------------------------------------------------------------------


class Cache(Protocol):
    """What attention keeps of earlier tokens of B sequences; what `truncate` and `fork` are given is on the CPU."""

    @property
    def lengths(self) -> Tensor:
        """Tokens kept of each sequence, int64 [B]."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def truncate(self, lengths: Tensor) -> None:
        """Forget all but the first `lengths` [B] tokens of each sequence."""
        ...

    def fork(self, rows: Tensor) -> "Cache":
        """Return a cache whose sequence i continues sequence `rows[i]` of this one."""
        ...

    def kept(self, row: int) -> Tensor:
        """Return what is kept of a sequence, [T, ...]: what another cache needs to go on with it."""
        ...

    def admit(self, entries: Tensor) -> None:
        """Take up one more sequence, of which `kept` of such a cache returned the entries."""
        ...


@runtime_checkable
class SteadyCache(Cache, Protocol):
    """A cache from which a forward may be recorded and run again: the same operations while the sequences grow."""

    def steady(self, count: int) -> bool:
        """Return whether a forward that appends `count` tokens to each sequence is so, from now on."""
        ...

    def reserve(self, count: int) -> Tensor:
        """Make room for `count` more tokens of each sequence; return the memory, one tensor as long as none moves."""
        ...

    def advance(self, count: int) -> None:
        """Count `count` more tokens of each sequence, which operations run again have just appended."""
        ...


class Attention(nn.Module, ABC):
    """Mixes information along a sequence: causally, and within one segment."""

    @abstractmethod
    def forward(self, x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the output [B, S, D] for x [B, S, D].

        Args:
            x: Normed hidden states.
            positions: int64 [B, S].
            segments: Document numbers, not decreasing along S, int64 [B, S].
            cache: Earlier tokens, to which these S are appended. Rows of a cache are one document each.
        """

    @abstractmethod
    def new_cache(self, batch: int, length: int) -> Cache:
        """Return an empty cache for `batch` sequences of at most `length` tokens."""

    @property
    @abstractmethod
    def cache_width(self) -> int:
        """Elements that the cache keeps for each token."""

    @abstractmethod
    def core_flops(self, context: int) -> int:
        """Return multiply-adds x 2 of the products between tokens, for one token that sees `context` others."""

    if TYPE_CHECKING:
        __call__ = forward


class FeedForward(nn.Module, ABC):
    """Transforms each token by itself, in four phases so that communication can hide behind computation.

    `route` and `compute` belong to the compute lane, `dispatch` and `combine` to the communication lane. The
    defaults are those of a feed-forward that sends nothing anywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.balancer: Balancer | None = None

    def route(self, x: Tensor) -> Dispatched:
        """Decide where the tokens of x [B, S, D] go."""
        return Dispatched(hidden=x)

    def dispatch(self, d: Dispatched) -> Dispatched:
        """Send the tokens to their experts."""
        return d

    @abstractmethod
    def compute(self, d: Dispatched) -> Dispatched:
        """Do the work."""

    def combine(self, d: Dispatched) -> FeedForwardOut:
        """Bring the results home."""
        assert d.shared is not None
        return FeedForwardOut(d.shared, None)

    def forward(self, x: Tensor) -> FeedForwardOut:
        """Return the output for x [B, S, D]: the four phases in order."""
        return self.combine(self.compute(self.dispatch(self.route(x))))

    @property
    def n_experts(self) -> int:
        """Routed experts of the whole model; 0 where there is no router."""
        return 0

    def rebalance(self, load: Tensor, now: Progress) -> None:
        """Move the expert biases after a step, given the global batch's load int64 [E]."""
        if self.balancer is not None:
            self.balancer.update(load, now)

    def active_parameters(self) -> int:
        """Return how many parameters and router biases one token passes through."""
        return sum(tensor.numel() for tensor in self.state_dict(keep_vars=True).values())

    if TYPE_CHECKING:
        __call__ = forward


class Router(nn.Module, ABC):
    """Chooses K of E experts for each token and weighs their outputs."""

    top_k: int

    @abstractmethod
    def forward(self, x: Tensor, bias: Tensor) -> Routing:
        """Return the routing of x [B, S, D] under the expert biases `bias` [E], which only move the choice."""

    if TYPE_CHECKING:
        __call__ = forward


class Balancer(nn.Module, ABC):
    """Keeps expert biases against the load."""

    adaptive: bool = True
    """Whether `update` is meant to move anything; the liveness check believes it."""

    @abstractmethod
    def bias(self) -> Tensor:
        """Return the expert biases, float32 [E]."""

    @abstractmethod
    def update(self, load: Tensor, now: Progress) -> None:
        """Move the biases, given the global batch's load int64 [E]."""

    def forward(self) -> Tensor:
        """Return the expert biases."""
        return self.bias()

    if TYPE_CHECKING:
        __call__ = forward


class Dispatcher(Protocol):
    """Sends tokens to experts and back."""

    def dispatch(self, x: Tensor, ids: Tensor) -> Rows:
        """Send x [N, D] to the experts `ids` [N, K]."""
        ...

    def combine(self, rows: Rows, gates: Tensor) -> Tensor:
        """Return the sum [N, D] of each token's expert outputs, weighted by `gates` [N, K]."""
        ...


class Shared:
    """What token objectives borrow from the trunk: the final norm and the head, and the embedding if any `embeds`."""

    def __init__(self, embedding: "Embedding | None", norm: nn.Module, head: "Head") -> None:
        self._embedding = embedding
        self.norm = norm
        self.head = head

    @property
    def embedding(self) -> "Embedding":
        """The embedding.

        Raises:
            RuntimeError: The rank does not hold it, as no objective says that it reads it.
        """
        if self._embedding is None:
            raise RuntimeError("the last stage holds no embedding: an objective that reads it says `embeds = True`")
        return self._embedding


class Embedding(nn.Module, ABC):
    """Token embedding in the compute dtype."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [B, S, D] of tokens int64 [B, S]."""

    if TYPE_CHECKING:
        __call__ = forward


class Head(nn.Module, ABC):
    """Output projection."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, S, V] of x [B, S, D], at least float32."""

    @abstractmethod
    def loss(self, x: Tensor, targets: Tensor, n_targets: int) -> Tensor:
        """Return the cross entropy of x [B, S, D] against targets [B, S], summed and divided by `n_targets`."""

    if TYPE_CHECKING:
        __call__ = forward


class TokenObjective(nn.Module, ABC):
    """A loss on tokens, computed from the trunk's output."""

    curve: Curve
    """Weight over the run."""

    embeds: bool = False
    """Whether it reads the embedding: then the last stage holds it too."""

    def weight(self, now: Progress) -> float:
        """Return the gradient put on this loss; reports are unweighted."""
        return self.curve(now)

    @abstractmethod
    def forward(self, trunk: Tensor, batch: Batch, shared: Shared) -> Loss:
        """Return the loss of trunk [B, S, D], the residual stream after the last block."""

    def phases(self, name: str, batch: Batch, shared: Shared) -> list[Phase]:
        """Return the phases that add this loss, under `name`, to the carry; by default one around `forward`."""

        def run(carry: Carry) -> Carry:
            assert carry.trunk is not None
            return evolve(carry, losses=(*carry.losses, (name, self(carry.trunk, batch, shared))))

        return [Phase(name, "compute", run)]

    def feedforwards(self) -> Sequence[FeedForward]:
        """Return the feed-forwards that this objective owns, the k-th counted as layer n_layers + k."""
        return ()

    if TYPE_CHECKING:
        __call__ = forward


@runtime_checkable
class Drafter(Protocol):
    """A token objective whose modules can guess tokens ahead: the k-th guesses token i + k + 1 at position i."""

    @property
    def depth(self) -> int:
        """Modules, and so tokens that can be drafted after the trunk's own."""
        ...

    def new_cache(self, k: int, batch: int, length: int) -> Cache:
        """Return an empty cache of module k, from 1 on, for `batch` sequences of at most `length` tokens."""
        ...

    def draft(self, k: int, hidden: Tensor, tokens: Tensor, positions: Tensor, cache: Cache, shared: Shared) -> Tensor:
        """Return the residual stream [B, S, D] after module k.

        Args:
            k: The module, from 1 on.
            hidden: Residual stream [B, S, D] at the positions: after the trunk, or else after module k - 1.
            tokens: Tokens k places further, int64 [B, S].
            positions: int64 [B, S].
            cache: What module k keeps of earlier positions.
            shared: What it borrows from the trunk.
        """
        ...

    def logits(self, k: int, hidden: Tensor, shared: Shared) -> Tensor:
        """Return the logits [B, S, V] of the token k + 1 places further, of what `draft` returned."""
        ...


class RoutingObjective(Protocol):
    """A loss on what the routers did."""

    def weight(self, now: Progress) -> float:
        """Return the gradient put on this loss; reports are unweighted."""
        ...

    def __call__(self, stats: RouterStats, batch: Batch) -> Tensor:
        """Return the loss of one block and one micro-batch, a scalar with gradient through `stats.affinity`."""
        ...


Objective: TypeAlias = TokenObjective | RoutingObjective


# --- around the model -------------------------------------------------------------------------------------------


class Precision(Protocol):
    """Makes the linears whose products may run in low precision, and names the dtypes of a run."""

    @property
    def compute(self) -> torch.dtype:
        """Dtype of activations."""
        ...

    @property
    def master(self) -> torch.dtype:
        """Dtype of parameters."""
        ...

    @property
    def rounding(self) -> float:
        """By how much of itself an operand may be off when a linear multiplies it; 0 if it is as it was given.

        One of less than 2^-9 of the largest of its matrix may be off by `rounding` times that.
        """
        ...

    def linear(self, ctx: "Context", d_in: int, d_out: int, *, input: Input = "plain") -> nn.Module:
        """Return a linear without bias, x [..., d_in] -> [..., d_out], with a parameter `weight` [d_out, d_in]."""
        ...

    def grouped_linear(self, ctx: "Context", n: int, d_in: int, d_out: int, *, input: Input = "plain") -> nn.Module:
        """Return this rank's share of `n` linears (the whole model's experts), (rows [M, d_in], counts) -> [M, d_out].

        Their parameter is `weight` [share, d_out, d_in], and the module says so: `axis = "expert"`, and in `experts`
        which they are: `ctx.parallel.layout.share(n)`.
        """
        ...


class Promise(NamedTuple):
    """What closed forms say of a plan.

    Attributes:
        bubble: The longest that a rank has nothing to do; None where no closed form holds.
        peak: The most slots that are alive on a rank at once; None where none is promised.
    """

    bubble: float | None
    peak: int | None


class Pipeline(Protocol):
    """Orders the work of a step."""

    def schedule(self, ranks: int, microbatches: int) -> "Plan":
        """Return the plan; a pure function."""
        ...

    def promises(self, ranks: int, microbatches: int, costs: "Costs") -> Promise:
        """Return what is known of the plan without running it."""
        ...


class Shard(nn.Parameter):
    """Some rows, by the first dimension, of a parameter whose others are elsewhere.

    An optimizer is given them where a sharding cuts parameters; one that needs them whole says so in `build`.
    """


class Sharding(Protocol):
    """Decides who keeps which parameter, and reduces gradients."""

    def attach(self, model: "Model") -> Sequence[tuple[str, nn.Parameter]]:
        """Return what the optimizer steps, with addresses."""
        ...

    def owned(self) -> Collection[str]:
        """Return the addresses that this rank writes into checkpoints; one rank owns each, or each row of it."""
        ...

    def rows(self) -> Mapping[str, range]:
        """Return which rows of the first dimension the model has here, for each address of which it has not all."""
        ...

    def reduce(self) -> None:
        """Sum the gradients over all who hold them, once the last weight gradient of a step is there."""
        ...

    def clip(self, limit: float) -> GradientNorm:
        """Scale the gradients down to a global L2 norm of `limit`; leave them if the norm is not finite."""
        ...

    def gather(self) -> None:
        """Give every holder the stepped parameters."""
        ...


class Guard(Protocol):
    """Judges a step before it changes anything."""

    @property
    def rolls_back(self) -> bool:
        """Whether it may ask for a rollback: then a run begins with a checkpoint."""
        ...

    def judge(self, result: Result, norm: GradientNorm) -> Verdict:
        """Return the verdict.

        Raises:
            NonFiniteError: The step is bad and this guard stops the run.
        """
        ...


class NonFiniteError(Exception):
    """A loss or a gradient is not finite, or past what the guard bears; the message names which."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def bos(self) -> int:
        """Id that begins a document."""
        ...

    @property
    def eos(self) -> int:
        """Id that ends a document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS and EOS."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        ...

    def to_json(self) -> str:
        """Return the content of a tokenizer.json that the `tokenizers` library reads."""
        ...


class HeldOut(Protocol):
    """Text that is never trained on."""

    n_bytes: int
    """Its UTF-8 bytes."""

    @property
    def references(self) -> Mapping[str, float]:
        """Bits per byte of general compressors on the same text, by name."""
        ...

    def batches(self, n_sequences: int) -> Iterable[tuple[Batch, int]]:
        """Yield batches of at most `n_sequences` that cover every target once, each with the bytes it covers."""
        ...


class Data(Protocol):
    """Where batches come from."""

    fingerprint: str
    """Hash of everything that decides the batches."""

    tokenizer: Tokenizer | None
    held_out: HeldOut | None

    def batch(self, now: Progress, n_sequences: int) -> Batch:
        """Return the global batch at `now`: a pure function of the seed, `now` and the size."""
        ...


@runtime_checkable
class Writable(Protocol):
    """Data that `tangram tokenize` can write, for the data component `tokens` to read."""

    def write(self, folder: "Path") -> None:
        """Write the tokenizer and all ids to `folder`.

        Raises:
            ValueError: The folder is there already, or cannot be written.
        """
        ...


# --- around a run ---------------------------------------------------------------------------------------------------


@frozen
class Job:
    """A command that a launcher runs; whatever it leaves behind, it writes itself.

    Attributes:
        name: Names it in logs; the name of a file.
        command: The command line, word by word.
    """

    name: str
    command: tuple[str, ...]


class Launcher(Protocol):
    """Runs the cells of a study, here or elsewhere."""

    workers: int
    """Jobs that may run at once."""

    threads: int
    """Threads that a job has for itself."""

    def run(self, jobs: Sequence[Job], folder: "Path") -> Generator[tuple[Job, int], None, None]:
        """Yield each job as it ends, with its exit code; negative for a signal, as `subprocess` has it.

        Closing the generator asks what still runs to stop and save, and waits for it.

        Args:
            jobs: What to run, in this order where not all can run at once.
            folder: For the logs, and files of the launcher's own.
        """
        ...


# --- configs: what a preset names ---------------------------------------------------------------------------------


class AttentionConfig(Protocol):
    """Fills the slot `attention`."""

    def build(self, ctx: "Context") -> Attention:
        """Build it."""
        ...


class FeedForwardConfig(Protocol):
    """Fills the slot `feedforward`."""

    def build(self, ctx: "Context") -> FeedForward:
        """Build it."""
        ...


class RouterConfig(Protocol):
    """Fills the slot `router`."""

    def build(self, ctx: "Context", n_experts: int) -> Router:
        """Build it."""
        ...


class BalancerConfig(Protocol):
    """Fills the slot `balancer`."""

    def build(self, ctx: "Context", n_experts: int) -> Balancer:
        """Build it."""
        ...


class DispatcherConfig(Protocol):
    """Fills the slot `dispatcher`."""

    def build(self, ctx: "Context", n_experts: int) -> Dispatcher:
        """Build it."""
        ...


class ObjectiveConfig(Protocol):
    """Fills the slot `objective`, a map."""

    def build(self, ctx: "Context", block: "BlockConfig") -> Objective:
        """Build it; `block` is the config of a block that it may build for itself."""
        ...


class PrecisionConfig(Protocol):
    """Fills the slot `precision`."""

    def build(self) -> Precision:
        """Build it."""
        ...


class PipelineConfig(Protocol):
    """Fills the slot `pipeline`."""

    def build(self) -> Pipeline:
        """Build it."""
        ...


class ShardingConfig(Protocol):
    """Fills the slot `sharding`."""

    def build(self, parallel: "Parallel") -> Sharding:
        """Build it."""
        ...


class OptimizerConfig(Protocol):
    """Fills the slot `optimizer`."""

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Build it for pairs of address and parameter; the learning rate is set before every step."""
        ...


class GuardConfig(Protocol):
    """Fills the slot `guard`."""

    def build(self) -> Guard:
        """Build it."""
        ...


class DataConfig(Protocol):
    """Fills the slot `data`. One whose data have a tokenizer is a `TokenizerReader` too."""

    def build(self, train: "TrainConfig", vocab_size: int) -> Data:
        """Build it."""
        ...


@runtime_checkable
class TokenizerReader(Protocol):
    """A data config that reads its tokenizer from the file that a run keeps: who generates needs no text."""

    def read_tokenizer(self, path: "Path", vocab_size: int) -> Tokenizer:
        """Return the tokenizer whose `to_json` was written to `path`.

        Raises:
            ValueError: It cannot be read, or has more tokens than the model has rows.
        """
        ...


class ObserverConfig(Protocol):
    """Fills the slot `observer`, a map."""

    def build(self) -> object:
        """Build an object with any of the run hooks of `tangram.core.hookspecs`."""
        ...


class LauncherConfig(Protocol):
    """Fills the slot `launcher`, which a study names and a preset does not."""

    def build(self) -> Launcher:
        """Build it."""
        ...


SLOTS: Mapping[str, type] = {
    "attention": AttentionConfig,
    "feedforward": FeedForwardConfig,
    "router": RouterConfig,
    "balancer": BalancerConfig,
    "dispatcher": DispatcherConfig,
    "objective": ObjectiveConfig,
    "precision": PrecisionConfig,
    "pipeline": PipelineConfig,
    "sharding": ShardingConfig,
    "optimizer": OptimizerConfig,
    "guard": GuardConfig,
    "data": DataConfig,
    "observer": ObserverConfig,
    "launcher": LauncherConfig,
}
"""Every slot, with the config contract that its components fulfil."""

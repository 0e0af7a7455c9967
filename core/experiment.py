"""What a preset resolves to: one attrs tree. Its fields are the keys of the YAML."""

from collections.abc import Mapping

from attrs import field, frozen
from attrs.validators import and_, ge, gt, in_, le, min_len, optional

from tangram.core.contracts import (
    AttentionConfig,
    DataConfig,
    FeedForwardConfig,
    GuardConfig,
    ObjectiveConfig,
    ObserverConfig,
    OptimizerConfig,
    PipelineConfig,
    PrecisionConfig,
    ShardingConfig,
)
from tangram.core.curve import Curve

RECOMPUTE = ("none", "selective", "full")
"""How much backward may compute again; the figures of each are in docs/performance.md."""


@frozen(kw_only=True)
class BlockConfig:
    """One transformer block.

    Attributes:
        attention: The attention.
        feedforward: The feed-forward.
    """

    attention: AttentionConfig
    feedforward: FeedForwardConfig


@frozen(kw_only=True)
class BlockGroup:
    """Consecutive blocks of one shape: a patch on `model.block`.

    Attributes:
        repeat: How many blocks.
        attention: The attention.
        feedforward: The feed-forward.
    """

    repeat: int = field(validator=and_(gt(0), le(1000)))
    attention: AttentionConfig
    feedforward: FeedForwardConfig

    @property
    def block(self) -> BlockConfig:
        """The config of one block of the group."""
        return BlockConfig(attention=self.attention, feedforward=self.feedforward)


@frozen(kw_only=True)
class ModelConfig:
    """The trunk.

    Attributes:
        dim: Width D of the residual stream.
        vocab_size: Rows of the embedding and of the head.
        init_std: Standard deviation of the normal initial weights.
        norm_eps: Added to the mean square in every RMSNorm.
        recompute: What backward computes again instead of keeping it: `none`; `selective`, norms, MLA up-projections
            and SwiGLU products; `full`, all of attention and of the feed-forward's products.
        block: What every block starts from.
        blocks: Groups of blocks in order.
    """

    dim: int = field(validator=gt(0))
    vocab_size: int = field(validator=gt(0))
    init_std: float = field(default=0.006, validator=gt(0.0))
    norm_eps: float = field(default=1e-6, validator=gt(0.0))
    recompute: str = field(default="none", validator=in_(RECOMPUTE))
    block: BlockConfig
    blocks: tuple[BlockGroup, ...] = field(validator=min_len(1))

    @property
    def n_layers(self) -> int:
        """Number of blocks in the trunk."""
        return sum(group.repeat for group in self.blocks)

    def layers(self) -> list[BlockConfig]:
        """Return the config of every block in order."""
        return [group.block for group in self.blocks for _ in range(group.repeat)]


@frozen(kw_only=True)
class TrainConfig:
    """How long and how fast.

    Attributes:
        tokens: Tokens after which the run ends.
        sequence_length: Positions S of a sequence.
        micro_sequences: Sequences of one micro-batch; a batch is a multiple of it.
        batch_sequences: Sequences of one step, a curve; rounded to a multiple of `micro_sequences`.
        lr: Learning rate, a curve.
        clip: Largest global gradient norm.
        seed: Seed of the initial weights and of the order of the data.
        init_from: A run whose newest weights and expert biases to start from, relative to the working directory;
            null draws them.
        evaluate_every: Steps between evaluations on part of the held-out text; 0 for none before the end.
        evaluate_sequences: Held-out sequences of such an evaluation; the one at the end sees all.
        checkpoint_every: Steps between checkpoints; 0 for one at the end only.
        keep_last: Newest checkpoints to keep; an older one is deleted once a newer one is written and verified.
        keep_every: Checkpoints at multiples of so many steps are kept too; 0 for none.
        prompt: Text that the sample at the end continues; empty for no sample.
    """

    tokens: int = field(validator=gt(0))
    sequence_length: int = field(validator=gt(1))
    micro_sequences: int = field(default=1, validator=gt(0))
    batch_sequences: Curve
    lr: Curve
    clip: float = field(default=1.0, validator=gt(0.0))
    seed: int = field(default=0, validator=ge(0))
    init_from: str | None = field(default=None, validator=optional(min_len(1)))
    evaluate_every: int = field(default=0, validator=ge(0))
    evaluate_sequences: int = field(default=64, validator=gt(0))
    checkpoint_every: int = field(default=0, validator=ge(0))
    keep_last: int = field(default=2, validator=gt(0))
    keep_every: int = field(default=0, validator=ge(0))
    prompt: str = ""


@frozen(kw_only=True)
class ParallelConfig:
    """Where the work runs.

    Attributes:
        pipeline: The order of the work.
        pipeline_ranks: Ranks that share out the layers.
        expert_ranks: Ranks with the same layers that share out the experts of each; the data ranks, which are all
            ranks divided by the pipeline's, are a multiple of it.
        sharding: Who keeps which parameter.
    """

    pipeline: PipelineConfig
    pipeline_ranks: int = field(default=1, validator=gt(0))
    expert_ranks: int = field(default=1, validator=gt(0))
    sharding: ShardingConfig


@frozen(kw_only=True)
class Experiment:
    """A resolved preset.

    Attributes:
        name: Name of the experiment; names the run directory.
        plugins: Single-file plugins to load, paths relative to the preset.
        model: The trunk.
        objectives: Losses by name.
        precision: Dtypes and the linears that may run in low precision.
        data: Where batches come from.
        optimizer: What moves the weights.
        guard: What judges a step.
        observers: What watches, by name.
        parallel: Where the work runs.
        train: How long and how fast.
    """

    name: str
    plugins: tuple[str, ...] = ()
    model: ModelConfig
    objectives: Mapping[str, ObjectiveConfig]
    precision: PrecisionConfig
    data: DataConfig
    optimizer: OptimizerConfig
    guard: GuardConfig
    observers: Mapping[str, ObserverConfig]
    parallel: ParallelConfig
    train: TrainConfig

"""A DeepSeek-V3 in which every piece is there and a step takes milliseconds, for laws about what surrounds a model."""

from functools import cache

from tangram.core.experiment import Experiment
from tangram.core.presets import load_preset

_OVERRIDES = (
    "model.dim=8",
    "model.vocab_size=24",
    "model.init_std=0.1",
    "model.block.attention={n_heads: 2, q_rank: 6, kv_rank: 4, nope_dim: 3, rope_dim: 2, value_dim: 3}",
    "model.block.feedforward={n_experts: 4, hidden: 4, router: {top_k: 2, n_groups: 2, top_groups: 1}}",
    "model.blocks.0={repeat: 1, feedforward: {hidden: 6}}",
    "model.blocks.1={repeat: 1}",
    "data={use: synthetic}",
    "optimizer={use: adamw}",
    "observers={console: null, jsonl: null, ema: null}",
    "train={sequence_length: 6, micro_sequences: 1, batch_sequences: 2, tokens: 48, lr: 0.01}",
    "train={evaluate_every: 0, checkpoint_every: 0, prompt: ''}",
)


@cache
def small_experiment(*overrides: str) -> Experiment:
    """Return the small model with `overrides` on top; four steps of two sequences, which nobody watches."""
    return load_preset("v3-tiny", *_OVERRIDES, *overrides)

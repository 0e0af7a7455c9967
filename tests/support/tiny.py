"""A DeepSeek-V3 small enough for proofs: every piece is there, and a step takes milliseconds."""

import json

import torch
from corpus import folder

from tangram.core import load_preset
from tangram.core.assembly import assemble
from tangram.core.experiment import Experiment
from tangram.core.step import Trainer
from tangram.plugins.data.text import TextConfig

SMALL = (
    "model.dim=16",
    "model.vocab_size=48",
    "model.init_std=0.1",
    "model.block.attention={n_heads: 2, q_rank: 12, kv_rank: 8, nope_dim: 6, rope_dim: 4, value_dim: 5}",
    "model.block.feedforward={n_experts: 8, hidden: 8, router: {top_k: 2, n_groups: 4, top_groups: 2}}",
    "model.block.feedforward.balancer.speed=0.001",
    "model.blocks.0={repeat: 1, feedforward: {hidden: 12}}",
    "model.blocks.1={repeat: 2}",
    "objectives.sequence_balance.weight=0.05",
    "data={use: synthetic}",
    "optimizer={use: adamw}",
    "observers={console: null}",
    "train={sequence_length: 12, micro_sequences: 1, batch_sequences: 4, tokens: 4800, evaluate_every: 0}",
    "train.lr=0.01",
    "train.checkpoint_every=0",
)


def tiny(*overrides: str) -> Experiment:
    """Return the small V3 with `overrides` on top."""
    return load_preset("v3-tiny", *SMALL, *overrides)


def exact(*overrides: str) -> Experiment:
    """Return the small V3 in float64, for proofs about gradients."""
    return tiny("precision.compute=float64", *overrides)


def on_text(*overrides: str, held_out_every: int = 5) -> Experiment:
    """Return a smaller V3 in float64 on a few files of text, with a tokenizer."""
    files = json.dumps(list(TextConfig.example(folder()).files))
    return exact(
        "model.blocks.1={repeat: 1}",
        "model.vocab_size=280",
        f"data={{use: text, corpus: files, files: {files}, held_out_every: {held_out_every}}}",
        *overrides,
    )


def backward(run: Trainer) -> dict[str, torch.Tensor]:
    """Run forward and backward of the first batch; return the gradients by address."""
    batch = run.data.batch(run.progress, 4)
    run.executor.run(batch, run.progress)
    return {address: p.grad for address, p in run.model.named_parameters() if p.grad is not None}


def trainer(experiment: Experiment) -> Trainer:
    """Return a trainer whose experts have biases, so that the choice is not the unbiased one."""
    run = assemble(experiment)
    stream = torch.Generator().manual_seed(5)
    for bias in run.model.biases().values():
        bias.copy_(0.1 * torch.randn(bias.shape, generator=stream))
    return run

"""Small models under the names of DeepSeek-V3's release, on our side and on that of transformers."""

import re
from pathlib import Path

import torch
from tiny import tiny
from torch import Tensor

from tangram.core import build_model, checkpoint
from tangram.core.experiment import Experiment
from tangram.core.model import Model
from tangram.core.presets import to_yaml

NEGATIVE = -3.0
"""Far below any affinity: the sums of all groups are negative, and a mask of zeros would let them win."""

CASES = {
    "as it is": (),
    "queries not compressed": ("model.block.attention.q_rank=null",),
    "yarn": ("model.block.attention.yarn={factor: 4.0, original_length: 8, mscale: 0.7, beta_fast: 4.0}",),
    "yarn, queries not compressed": (
        "model.block.attention={q_rank: null, yarn: {factor: 4.0, original_length: 8, mscale: 0.7, beta_fast: 4.0}}",
    ),
    "two dense, one group, two shared": (
        "model.blocks.0.repeat=2",
        "model.block.feedforward={n_shared: 2, router: {n_groups: 1, top_groups: 1, gate_scale: 1.0}}",
    ),
    "top_k, no biases, none dense": (
        "model.blocks=[{repeat: 2}]",
        "model.block.feedforward={router: {use: top_k, top_k: 3, score: sigmoid, normalise: false}}",
        "model.block.feedforward={balancer: {use: none}}",
    ),
    "two further tokens": ("objectives.mtp.depth=2", "model.block.attention.theta=500.0"),
}


def fill(model: Model, *, bias: float = 0.0, seed: int = 1) -> Model:
    """Give norms and biases values of their own, so that no two of them are alike; biases lie around `bias`."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for address, tensor in model.state_dict(keep_vars=True).items():
            noise = torch.randn(tensor.shape, generator=stream)
            if address.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif address.endswith("biases"):
                tensor.copy_(bias + 0.2 * noise)
            else:
                tensor.copy_(0.3 * noise)
    return model


def saved(folder: Path, *overrides: str, bias: float = 0.0) -> tuple[Experiment, Model]:
    """Write a run directory with one checkpoint, of step 7, and return what is in it."""
    experiment = tiny(*overrides)
    model = fill(build_model(experiment), bias=bias)
    checkpoint.save(folder / "checkpoints", 7, {"model": model.state_dict()}, {})
    (folder / "experiment.yaml").write_text(to_yaml(experiment), encoding="utf-8")
    return experiment, model


_FUSED = (
    (r"^embedding\.weight", "model.embed_tokens.weight"),
    (r"^norm\.weight", "model.norm.weight"),
    (r"^head\.weight", "lm_head.weight"),
    (r"blocks\.(\d+)\.attention_norm", r"model.layers.\1.input_layernorm"),
    (r"blocks\.(\d+)\.feedforward_norm", r"model.layers.\1.post_attention_layernorm"),
    (r"blocks\.(\d+)\.attention\.", r"model.layers.\1.self_attn."),
    (r"blocks\.(\d+)\.feedforward\.", r"model.layers.\1.mlp."),
    (r"q_down", "q_a_proj"),
    (r"q_norm", "q_a_layernorm"),
    (r"kv_down", "kv_a_proj_with_mqa"),
    (r"kv_norm", "kv_a_layernorm"),
    (r"kv_up", "kv_b_proj"),
    (r"self_attn\.out", "self_attn.o_proj"),
    (r"mlp\.router\.centroids", "mlp.gate"),
    (r"mlp\.balancer\.biases", "mlp.gate.e_score_correction_bias"),
    (r"mlp\.shared\.", "mlp.shared_experts."),
)


def fused(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the trunk's tensors, or gradients, by their names in transformers, which keeps experts fused."""
    direct = not any("q_down" in address for address in ours)
    found = {}
    for address, tensor in ours.items():
        if address.startswith("objectives."):
            continue
        name = address.replace("q_up", "q_proj" if direct else "q_b_proj")
        for pattern, replacement in _FUSED:
            name = re.sub(pattern, replacement, name)
        if tensor.ndim == 3:
            name = re.sub(r"mlp\.(gate_up|down)\.weight", r"mlp.experts.\1_proj", name)
        elif "gate_up" in name:
            gate, up = tensor.chunk(2)
            found[name.replace("gate_up", "up_proj")] = up
            name, tensor = name.replace("gate_up", "gate_proj"), gate
        found[re.sub(r"\.down\.weight", ".down_proj.weight", name)] = tensor
    return found

"""The same DeepSeek-V3 twice: here and in `transformers` (pip install transformers==5.23.0), with the same weights."""

import torch
from torch import Tensor

from tangram.core import load_preset
from tangram.core.experiment import Experiment
from tangram.core.model import Model
from tangram.plugins.attention.mla import MLAConfig
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.plugins.moe.moe import MoEConfig
from tangram.plugins.moe.swiglu import SwiGLUConfig

LENGTH = 512
"""Positions of a sequence."""

SIZES: dict[str, tuple[str, ...]] = {
    "19.5M": (),
    "105M": (
        "model.dim=512",
        "model.vocab_size=16384",
        "model.block.attention={n_heads: 8, q_rank: 256, kv_rank: 128, nope_dim: 64, rope_dim: 32, value_dim: 64}",
        "model.block.feedforward={hidden: 224}",
        "model.blocks=[{repeat: 1, feedforward: {use: swiglu, hidden: 1536}}, {repeat: 7}]",
    ),
}


def experiment(size: str, compute: str, batch: int) -> Experiment:
    """Return v3-tiny's trunk at a size, with the next token as the only loss, as `transformers` trains it."""
    return load_preset(
        "v3-tiny",
        *SIZES[size],
        f"precision.compute={compute}",
        "objectives={mtp: null, sequence_balance: null}",
        "data={use: synthetic}",
        "optimizer={use: adamw}",
        "observers={console: null, jsonl: null}",
        f"train.micro_sequences={batch}",
        f"train.batch_sequences={batch}",
        "train.lr=1.0e-4",
        "train.clip=1.0e+9",
    )


def transformers_config(experiment: Experiment):  # type: ignore[no-untyped-def]
    """Return the peer's config of the same shape."""
    from transformers import DeepseekV3Config

    model = experiment.model
    attention, moe, dense = model.block.attention, model.block.feedforward, model.blocks[0].feedforward
    assert isinstance(attention, MLAConfig) and isinstance(moe, MoEConfig) and isinstance(dense, SwiGLUConfig)
    router = moe.router
    assert isinstance(router, GroupLimitedConfig)
    return DeepseekV3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        num_hidden_layers=model.n_layers,
        first_k_dense_replace=model.blocks[0].repeat,
        intermediate_size=dense.hidden,
        moe_intermediate_size=moe.hidden,
        n_routed_experts=moe.n_experts,
        n_shared_experts=moe.n_shared,
        num_experts_per_tok=router.top_k,
        n_group=router.n_groups,
        topk_group=router.top_groups,
        routed_scaling_factor=router.gate_scale,
        norm_topk_prob=router.normalise,
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_heads,
        q_lora_rank=attention.q_rank,
        kv_lora_rank=attention.kv_rank,
        qk_nope_head_dim=attention.nope_dim,
        qk_rope_head_dim=attention.rope_dim,
        v_head_dim=attention.value_dim,
        max_position_embeddings=2048,
        num_nextn_predict_layers=0,
        use_cache=False,
    )


ATTENTION = {
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "out": "o_proj",
}


def as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under our addresses (weights or gradients) under the peer's names."""
    named: dict[str, Tensor] = {}
    for address, tensor in state.items():
        parts = address.split(".")
        match parts:
            case ["objectives", *_]:
                continue  # the peer has no multi-token prediction
            case ["embedding", "weight"]:
                named["model.embed_tokens.weight"] = tensor
            case ["norm", "weight"]:
                named["model.norm.weight"] = tensor
            case ["head", "weight"]:
                named["lm_head.weight"] = tensor
            case ["blocks", layer, "attention_norm", _]:
                named[f"model.layers.{layer}.input_layernorm.weight"] = tensor
            case ["blocks", layer, "feedforward_norm", _]:
                named[f"model.layers.{layer}.post_attention_layernorm.weight"] = tensor
            case ["blocks", layer, "attention", part, _]:
                named[f"model.layers.{layer}.self_attn.{ATTENTION[part]}.weight"] = tensor
            case ["blocks", layer, "feedforward", *rest]:
                named |= _feedforward(f"model.layers.{layer}.mlp", rest, tensor)
    return named


def _feedforward(prefix: str, rest: list[str], tensor: Tensor) -> dict[str, Tensor]:
    match rest:
        case ["router", *_]:
            return {f"{prefix}.gate.weight": tensor}
        case ["balancer", *_]:
            return {f"{prefix}.gate.e_score_correction_bias": tensor}
        case ["gate_up" | "down" as name, _] if tensor.ndim == 3:
            return {f"{prefix}.experts.{name}_proj": tensor}
        case ["shared", name, _]:
            return _dense(f"{prefix}.shared_experts", name, tensor)
        case [name, _]:
            return _dense(prefix, name, tensor)
    raise KeyError(".".join(rest))


def _dense(prefix: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "down":
        return {f"{prefix}.down_proj.weight": tensor}
    gate, up = tensor.chunk(2)
    return {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}


def twin(model: Model, experiment: Experiment, attention: str = "sdpa"):  # type: ignore[no-untyped-def]
    """Return the peer's model with the weights of `model`."""
    from transformers import DeepseekV3ForCausalLM

    other = DeepseekV3ForCausalLM._from_config(transformers_config(experiment), attn_implementation=attention)
    other.load_state_dict({name: t.detach().clone() for name, t in as_transformers(model.state_dict()).items()})
    return other


def tokens(vocab_size: int, batch: int, seed: int) -> Tensor:
    """Return random tokens int64 [B, S]."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, LENGTH), generator=stream)

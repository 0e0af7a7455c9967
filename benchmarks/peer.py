"""The same DeepSeek-V3 twice: here and in `transformers` (pip install transformers==5.23.0), with the same weights."""

import statistics

import torch
from torch import Tensor

from tangram.core import load_preset
from tangram.core.assembly import Seat, assemble
from tangram.core.experiment import Experiment
from tangram.core.model import Model
from tangram.core.records import IGNORE, Batch, one_document
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
    # V3's heads and latent; an expert's products are large enough for a GPU.
    "1.1B": (
        "model.dim=1536",
        "model.vocab_size=32768",
        "model.block.attention={n_heads: 16, q_rank: 768, kv_rank: 512, nope_dim: 128, rope_dim: 64, value_dim: 128}",
        "model.block.feedforward={hidden: 512}",
        "model.blocks=[{repeat: 1, feedforward: {use: swiglu, hidden: 4096}}, {repeat: 11}]",
    ),
    "toy": (
        "model.dim=128",
        "model.vocab_size=512",
        "model.block.attention={n_heads: 2, q_rank: 64, kv_rank: 32, nope_dim: 32, rope_dim: 16, value_dim: 32}",
        "model.block.feedforward={hidden: 64}",
        "model.blocks=[{repeat: 1, feedforward: {use: swiglu, hidden: 256}}, {repeat: 1}]",
    ),
}


def experiment(size: str, precision: str, batch: int, *others: str) -> Experiment:
    """Return v3-tiny's trunk at a size, with the next token as the only loss, as `transformers` trains it.

    Args:
        size: One of `SIZES`.
        precision: float32 or bfloat16 for products in that dtype, or fp8.
        batch: Sequences of a step.
        others: Further overrides.
    """
    kind = "{use: fp8}" if precision == "fp8" else f"{{use: full, compute: {precision}}}"
    return load_preset(
        "v3-tiny",
        *SIZES[size],
        f"precision={kind}",
        "objectives={mtp: null, sequence_balance: null}",
        "data={use: synthetic}",
        "optimizer={use: adamw}",
        "observers={console: null, jsonl: null}",
        f"train.micro_sequences={batch}",
        f"train.batch_sequences={batch}",
        "train.lr=1.0e-4",
        "train.clip=1.0e+9",
        *others,
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
        max_position_embeddings=4096,
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


def in_bfloat16(model):  # type: ignore[no-untyped-def]
    """Return the peer's model with its weights in bfloat16; its angles and its routers' biases stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def tokens(vocab_size: int, batch: int, seed: int, length: int = LENGTH) -> Tensor:
    """Return random tokens int64 [B, S]."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length), generator=stream)


def batch_of(ids: Tensor) -> Batch:
    """Return the batch whose loss is the one that the peer takes: the last position has no target."""
    targets = torch.full_like(ids, IGNORE)
    targets[:, :-1] = ids[:, 1:]
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return Batch(ids, targets, positions, one_document(ids), int((targets != IGNORE).sum()), len(ids))


def compare(size: str, device: str = "cpu", length: int = LENGTH) -> None:
    """Check that both sides compute one loss and one gradient, in float32.

    Raises:
        SystemExit: They do not.
    """
    with_two = experiment(size, "float32", 2)
    run = assemble(with_two, Seat(device=torch.device(device)))
    for parameter in run.model.parameters():
        parameter.data *= 3 if parameter.ndim > 1 else 1  # or the routing would be nearly flat
    other = twin(run.model, with_two).to(device)
    ids = tokens(with_two.model.vocab_size, 2, 0, length).to(device)
    ours = run.executor.run(batch_of(ids), run.progress).losses["next_token"]
    theirs = other(input_ids=ids, labels=ids).loss
    theirs.backward()
    grads = as_transformers({a: p.grad for a, p in run.model.named_parameters() if p.grad is not None})
    errors = [
        float((grads[name] - p.grad).norm() / p.grad.norm())
        for name, p in other.named_parameters()
        if p.grad.norm() > 0
    ]
    print(f"{size}: loss {ours:.6f} and {theirs.item():.6f}; largest relative gradient error {max(errors):.1e}")
    if abs(ours - theirs.item()) > 1e-4 or max(errors) > 1e-4:
        raise SystemExit("the two sides do not compute the same: no figure is worth printing")


def spread(values: list[float], form: str) -> str:
    """Return the median with the smallest and largest."""
    shown = [format(value, form) for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"

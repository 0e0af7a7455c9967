"""config.json of DeepSeek-V3's format: written so that old and new readers take it, and read as strictly.

transformers from version 5 calls `rope_parameters` and `dtype` what older readers and DeepSeek's own release call
`rope_scaling` with `rope_theta`, and `torch_dtype`; both are written. `head_dim`, which transformers adds, is the width
of the rotary part alone and is never read.
"""

from collections.abc import Mapping
from typing import Any

from tangram.core.deepseek_format import NORM_EPS, FormatError, Shape, Tree

BLOCK = 128
"""Side of the blocks of an FP8 release."""

_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v3",),
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "rms_norm_eps": (NORM_EPS,),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
}
"""What the format leaves no choice in, for the model that we have: written, and refused if it is anything else."""

_YARN = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale_all_dim",
}
"""Our keys and theirs. `mscale`, theirs, must be the same: only the ratio of the two would scale the rotary part."""

_ATTENTION = {
    "n_heads": "num_attention_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
}

_MODEL = {
    "dim": "hidden_size",
    "vocab_size": "vocab_size",
    "init_std": "initializer_range",
    "n_layers": "num_hidden_layers",
    "n_dense": "first_k_dense_replace",
    "n_experts": "n_routed_experts",
    "n_shared": "n_shared_experts",
    "hidden": "moe_intermediate_size",
    "top_k": "num_experts_per_tok",
    "n_groups": "n_group",
    "top_groups": "topk_group",
    "normalise": "norm_topk_prob",
    "gate_scale": "routed_scaling_factor",
    "length": "max_position_embeddings",
}

_KINDS: dict[str, type] = {"norm_topk_prob": bool, "initializer_range": float, "routed_scaling_factor": float}
"""What is no integer."""


def write_config(shape: Shape, *, dtype: str, fp8: bool, tokens: Mapping[str, int | None]) -> dict[str, Any]:
    """Return config.json.

    Args:
        shape: The model.
        dtype: Dtype of the weights that are no FP8.
        fp8: Whether the linears are E4M3 codes with scales.
        tokens: Ids under `bos_token_id` and so on.
    """
    yarn = shape.attention["yarn"]
    rope = {"rope_type": "default"}
    if yarn:
        rope = {"rope_type": "yarn", **{theirs: yarn[ours] for ours, theirs in _YARN.items()}, "mscale": yarn["mscale"]}
    theta = shape.attention["theta"]
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        **{key: allowed[0] for key, allowed in _FIXED.items()},
        **{theirs: getattr(shape, ours) for ours, theirs in _MODEL.items()},
        **{theirs: shape.attention[ours] for ours, theirs in _ATTENTION.items()},
        "num_key_value_heads": shape.attention["n_heads"],
        # Never null, for readers that build no dense block but want a number.
        "intermediate_size": shape.dense_hidden or shape.hidden,
        "num_nextn_predict_layers": shape.depth,
        "rope_theta": theta,
        "rope_scaling": {"type": "yarn", **rope} if yarn else None,
        "rope_parameters": rope | {"rope_theta": theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "pretraining_tp": 1,
        "use_cache": True,
        "output_router_logits": False,
        **tokens,
    }
    if shape.depth:
        config["mtp_input"] = shape.mtp_input  # ours: the paper leaves open what MTP reads, and engines differ
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "activation_scheme": "dynamic",
        }
    return config


def read_config(config: Tree, depth: int) -> Shape:
    """Return the shape that config.json says.

    Args:
        config: Its content.
        depth: Blocks for multi-token prediction that the weights hold: transformers writes none of them and leaves
            their number in the config.

    Raises:
        FormatError: A key is missing or says what we do not compute.
    """
    for key, allowed in _FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise FormatError(key, f"{config[key]!r} is not {allowed[0]!r}")
    if "model_type" not in config:
        raise FormatError("model_type", "missing; it must be 'deepseek_v3'")
    if depth not in (0, config.get("num_nextn_predict_layers", depth)):
        text = f"{config['num_nextn_predict_layers']}, but the weights hold {depth} such layers"
        raise FormatError("num_nextn_predict_layers", text)
    model = {ours: _number(config, theirs) for ours, theirs in _MODEL.items()}
    attention = {ours: _number(config, theirs) for ours, theirs in _ATTENTION.items() if ours != "q_rank"}
    attention["q_rank"] = None if config.get("q_lora_rank") is None else _number(config, "q_lora_rank")
    if config.get("num_key_value_heads") not in (None, attention["n_heads"]):
        raise FormatError("num_key_value_heads", f"{config['num_key_value_heads']} is not num_attention_heads")
    if not 0 <= model["n_dense"] < model["n_layers"]:
        raise FormatError("first_k_dense_replace", f"{model['n_dense']} of {model['n_layers']} layers leave no experts")
    return Shape(
        **model,
        dense_hidden=_number(config, "intermediate_size") if model["n_dense"] else None,
        attention=attention | _rope(config, model["length"]),
        depth=depth,
        mtp_input=config.get("mtp_input", "post_norm") if depth else "post_norm",
    )


def _rope(config: Tree, length: int) -> dict[str, Any]:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise FormatError("rope_scaling", f"{rope!r} is no map")
    theta = _number({"rope_theta": 10000.0, **config, **rope}, "rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"theta": theta, "yarn": None}
    if kind != "yarn":
        raise FormatError("rope_scaling.type", f"{kind!r} is neither 'default' nor 'yarn'")
    rope = {"beta_fast": 32.0, "beta_slow": 1.0} | rope
    yarn = {ours: _number(rope, theirs, float) for ours, theirs in _YARN.items()}
    yarn["original_length"] = int(yarn["original_length"])
    if rope.get("mscale") != yarn["mscale"] or not yarn["mscale"] or rope.get("attention_factor") not in (None, 1.0):
        raise FormatError("rope_scaling.mscale", "must be mscale_all_dim and not 0: else the rotary part has a scale")
    if rope.get("truncate", True) is not True:
        raise FormatError("rope_scaling.truncate", "must be true")
    if length <= yarn["original_length"]:
        text = f"{length} is not above original_max_position_embeddings: DeepSeek's code then leaves YaRN out"
        raise FormatError("max_position_embeddings", f"{text}, and transformers does not")
    return {"theta": theta, "yarn": yarn}


def _number(config: Tree, key: str, kind: type | None = None) -> Any:
    kind = kind or _KINDS.get(key, int)
    value = config.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        name = {int: "an integer", float: "a number", bool: "true or false"}[kind]
        raise FormatError(key, f"{value!r} is not {name}" if key in config else "missing")
    return value


def read_tile(config: Tree) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale where the weights are FP8; None where they are not.

    Raises:
        FormatError: They are quantised in another way.
    """
    quantised = config.get("quantization_config")
    if quantised is None:
        return None
    match quantised:
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if rows > 0 and columns > 0:
            return rows, columns
    raise FormatError("quantization_config", f"{quantised!r} is not fp8 with a weight_block_size")

"""The format of DeepSeek-V3's released weights: which models it can say, and where each of its tensors stands in ours.

Every matrix of the format is a range of rows of one of our tensors, whose first dimensions are flattened: `gate_proj`
the first half of `gate_up`, an expert's matrix its slice of the grouped one. Our rows and columns have the order of the
release: `[latent | rotary]` below `kv_a_proj_with_mqa`, `[no position | rotary]` and `[key | value]` for each head, and
`[embedding ; hidden]` in the columns of `eh_proj`, where equation 21 of arXiv:2412.19437 prints the other order.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from attrs import field, frozen

Tree: TypeAlias = Mapping[str, Any]
"""An experiment as plain data: what `presets.dump` returns, or a part of it."""

NORM_EPS = 1e-6
"""The only one: the norms of the latents have it in transformers and DeepSeek's code, whatever `rms_norm_eps` says."""

SCALE = "_scale_inv"
"""Ends the name of a tensor of scales; despite its name it multiplies the codes."""


class FormatError(Exception):
    """A model and the format do not go together; the message begins with the key that says so."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")


@frozen(kw_only=True)
class Shape:
    """All that the format says of a model, under the names that our presets use.

    Attributes:
        dim: Width D of the residual stream.
        vocab_size: Rows of the embedding and of the head.
        init_std: Standard deviation of the initial weights.
        n_layers: Blocks in the trunk.
        n_dense: Blocks at its beginning whose feed-forward is dense.
        dense_hidden: Width of a dense feed-forward; None where there is none.
        attention: Fields of `mla` by name.
        n_experts: Routed experts E.
        n_shared: Shared experts.
        hidden: Width I of one expert.
        top_k: Experts K for each token.
        n_groups: Groups of experts.
        top_groups: Groups that a token may reach.
        normalise: Whether a token's gates are divided by their sum.
        gate_scale: Multiplies the gates.
        biased: Whether our weights have router biases; the format always has, if of zeros.
        depth: Blocks for multi-token prediction.
        objective: Name of the objective that owns them.
        mtp_input: What they read of the trunk: `post_norm` or `pre_norm`.
        length: Positions that the model is meant for.
    """

    dim: int
    vocab_size: int
    init_std: float
    n_layers: int
    n_dense: int
    dense_hidden: int | None
    attention: Tree
    n_experts: int
    n_shared: int
    hidden: int
    top_k: int
    n_groups: int
    top_groups: int
    normalise: bool
    gate_scale: float
    biased: bool = True
    depth: int = 0
    objective: str = "mtp"
    mtp_input: str = "post_norm"
    length: int = field(eq=False)


@frozen(kw_only=True)
class Piece:
    """A tensor of the format, and the rows of ours that it is.

    Attributes:
        name: Its name in the format.
        shape: Its shape there.
        address: Our tensor; None for zeros.
        start: The first of its rows in our tensor.
        quantised: Whether an FP8 release keeps it as codes and scales.
        copied: Whether it repeats another tensor of the format, for readers that load MTP on its own.
    """

    name: str
    shape: tuple[int, ...]
    address: str | None
    start: int = 0
    quantised: bool = False
    copied: bool = False


# --- our experiment to the shape, and back ----------------------------------------------------------------


def shape_of(experiment: Tree) -> Shape:
    """Return the shape of a resolved experiment.

    Raises:
        FormatError: The format cannot say it.
    """
    model, objectives = experiment["model"], experiment["objectives"]
    attention, moe = model["block"]["attention"], model["block"]["feedforward"]
    _refuse_unless(attention["use"] == "mla", "model.block.attention", f"{attention['use']} is not mla")
    _refuse_unless(moe["use"] == "moe", "model.block.feedforward", f"{moe['use']} is not moe")
    n_layers, dense = 0, list[tuple[int, int]]()
    for number, group in enumerate(model["blocks"]):
        path, feedforward = f"model.blocks.{number}", group["feedforward"]
        _refuse_unless(group["attention"] == attention, f"{path}.attention", "differs from model.block.attention")
        if feedforward["use"] == "swiglu" and len(dense) == number:
            dense.append((group["repeat"], feedforward["hidden"]))
        else:
            text = "must be swiglu in the first blocks, then that of model.block"
            _refuse_unless(feedforward == moe, f"{path}.feedforward", text)
        n_layers += group["repeat"]
    _refuse_unless(len(dense) < len(model["blocks"]), "model.blocks", "no block has experts")
    _refuse_unless(len({width for _, width in dense}) < 2, "model.blocks", "dense feed-forwards differ in width")
    text = f"is {model['norm_eps']}; readers disagree on what else than {NORM_EPS} is for the norms of latents"
    _refuse_unless(model["norm_eps"] == NORM_EPS, "model.norm_eps", text)
    yarn = attention["yarn"]
    stretched = yarn and round(yarn["factor"] * yarn["original_length"])
    _refuse_unless(not yarn or yarn["mscale"] > 0, "model.block.attention.yarn.mscale", "0 means something else there")
    return Shape(
        dim=model["dim"],
        vocab_size=model["vocab_size"],
        init_std=model["init_std"],
        n_layers=n_layers,
        n_dense=sum(repeat for repeat, _ in dense),
        dense_hidden=dense[0][1] if dense else None,
        attention={key: value for key, value in attention.items() if key != "use"},
        **_experts(moe),
        **_mtp(objectives),
        length=stretched or experiment["train"]["sequence_length"],
    )


def _experts(moe: Tree) -> dict[str, Any]:
    path, router = "model.block.feedforward", moe["router"]
    _refuse_unless(router["use"] in ("group_limited", "top_k"), f"{path}.router", f"{router['use']} is no such router")
    _refuse_unless(router["score"] == "sigmoid", f"{path}.router.score", f"{router['score']} is not sigmoid")
    balancer = moe["balancer"]["use"]
    _refuse_unless(balancer in ("aux_free", "none"), f"{path}.balancer", f"{balancer} is neither aux_free nor none")
    _refuse_unless(moe["n_shared"] > 0, f"{path}.n_shared", "there must be a shared expert")
    n_groups = router.get("n_groups", 1)  # top_k is one group
    text = f"{n_groups} groups of fewer than two of {moe['n_experts']} experts; a group is judged by its best two"
    _refuse_unless(moe["n_experts"] >= 2 * n_groups, f"{path}.router.n_groups", text)
    return {
        "n_experts": moe["n_experts"],
        "n_shared": moe["n_shared"],
        "hidden": moe["hidden"],
        "top_k": router["top_k"],
        "n_groups": n_groups,
        "top_groups": router.get("top_groups", 1),
        "normalise": router["normalise"],
        "gate_scale": router.get("gate_scale", 1.0),
        "biased": balancer == "aux_free",
    }


def _mtp(objectives: Tree) -> dict[str, Any]:
    found = [(name, config) for name, config in objectives.items() if config["use"] == "mtp"]
    _refuse_unless(len(found) < 2, "objectives", "there is room for one mtp, and there are more")
    return {
        key: value
        for name, config in found
        for key, value in (("depth", config["depth"]), ("objective", name), ("mtp_input", config["input"]))
    }


def _refuse_unless(condition: object, key: str, text: str) -> None:
    if not condition:
        raise FormatError(key, f"{text}: DeepSeek-V3's format cannot say that")


def trees_of(shape: Shape) -> tuple[Tree, Tree]:
    """Return `model` and `objectives` of a preset that has this shape, laid over any other."""
    router = {
        "use": "group_limited",
        "top_k": shape.top_k,
        "score": "sigmoid",
        "n_groups": shape.n_groups,
        "top_groups": shape.top_groups,
        "normalise": shape.normalise,
        "gate_scale": shape.gate_scale,
    }
    moe = {
        "use": "moe",
        "n_experts": shape.n_experts,
        "n_shared": shape.n_shared,
        "hidden": shape.hidden,
        "router": router,
        "balancer": {"use": "aux_free"},
        "dispatcher": {"use": "local"},
    }
    dense = {"repeat": shape.n_dense, "feedforward": {"use": "swiglu", "hidden": shape.dense_hidden}}
    model = {
        "dim": shape.dim,
        "vocab_size": shape.vocab_size,
        "init_std": shape.init_std,
        "norm_eps": NORM_EPS,
        "block": {"attention": {"use": "mla", **shape.attention}, "feedforward": moe},
        "blocks": [dense] * (shape.n_dense > 0) + [{"repeat": shape.n_layers - shape.n_dense}],
    }
    mtp = {"use": "mtp", "depth": shape.depth, "input": shape.mtp_input} if shape.depth else None
    return model, {shape.objective: mtp}


# --- the names --------------------------------------------------------------------------------------------


def pieces(shape: Shape) -> list[Piece]:
    """Return all tensors of the format in the order of the model, MTP's blocks after the trunk's."""
    table = shape.vocab_size, shape.dim
    found = [Piece(name="model.embed_tokens.weight", shape=table, address="embedding.weight")]
    for layer in range(shape.n_layers):
        found += _block(shape, f"model.layers.{layer}", f"blocks.{layer}", dense=layer < shape.n_dense)
    found.append(_norm("model.norm", "norm", shape.dim))
    found.append(Piece(name="lm_head.weight", shape=table, address="head.weight"))
    for k in range(shape.depth):
        there, here = f"model.layers.{shape.n_layers + k}", f"objectives.{shape.objective}.depths.{k}"
        # vLLM fills a draft model of its own from these two; transformers and others take the trunk's.
        copy = Piece(name=f"{there}.embed_tokens.weight", shape=table, address="embedding.weight", copied=True)
        join = shape.dim, 2 * shape.dim
        found += [copy, _norm(f"{there}.enorm", f"{here}.embedding_norm", shape.dim)]
        found.append(_norm(f"{there}.hnorm", f"{here}.hidden_norm", shape.dim))
        found.append(Piece(name=f"{there}.eh_proj.weight", shape=join, address=f"{here}.projection.weight"))
        found += _block(shape, there, f"{here}.block", dense=False)
        found.append(_norm(f"{there}.shared_head.norm", f"{here}.norm", shape.dim))
        found.append(Piece(name=f"{there}.shared_head.head.weight", shape=table, address="head.weight", copied=True))
    return found


def _block(shape: Shape, there: str, here: str, *, dense: bool) -> Iterator[Piece]:
    yield _norm(f"{there}.input_layernorm", f"{here}.attention_norm", shape.dim)
    yield from _attention(shape, f"{there}.self_attn", f"{here}.attention")
    yield _norm(f"{there}.post_attention_layernorm", f"{here}.feedforward_norm", shape.dim)
    there, here = f"{there}.mlp", f"{here}.feedforward"
    if dense:
        assert shape.dense_hidden is not None
        yield from _swiglu(there, here, shape.dim, shape.dense_hidden)
        return
    weight = f"{here}.router.centroids.weight"
    bias = f"{here}.balancer.biases" if shape.biased else None
    yield Piece(name=f"{there}.gate.weight", shape=(shape.n_experts, shape.dim), address=weight)
    yield Piece(name=f"{there}.gate.e_score_correction_bias", shape=(shape.n_experts,), address=bias)
    for expert in range(shape.n_experts):
        yield from _swiglu(f"{there}.experts.{expert}", here, shape.dim, shape.hidden, expert)
    yield from _swiglu(f"{there}.shared_experts", f"{here}.shared", shape.dim, shape.n_shared * shape.hidden)


def _attention(shape: Shape, there: str, here: str) -> Iterator[Piece]:
    a = shape.attention
    heads, q_rank, kv_rank = a["n_heads"], a["q_rank"], a["kv_rank"]
    queries = heads * (a["nope_dim"] + a["rope_dim"])
    if q_rank is None:
        yield _linear(f"{there}.q_proj", f"{here}.q_up", queries, shape.dim)
    else:
        yield _linear(f"{there}.q_a_proj", f"{here}.q_down", q_rank, shape.dim)
        yield _norm(f"{there}.q_a_layernorm", f"{here}.q_norm", q_rank)
        yield _linear(f"{there}.q_b_proj", f"{here}.q_up", queries, q_rank)
    yield _linear(f"{there}.kv_a_proj_with_mqa", f"{here}.kv_down", kv_rank + a["rope_dim"], shape.dim)
    yield _norm(f"{there}.kv_a_layernorm", f"{here}.kv_norm", kv_rank)
    yield _linear(f"{there}.kv_b_proj", f"{here}.kv_up", heads * (a["nope_dim"] + a["value_dim"]), kv_rank)
    yield _linear(f"{there}.o_proj", f"{here}.out", shape.dim, heads * a["value_dim"])


def _swiglu(there: str, here: str, dim: int, hidden: int, expert: int = 0) -> Iterator[Piece]:
    first = expert * 2 * hidden
    yield _linear(f"{there}.gate_proj", f"{here}.gate_up", hidden, dim, first)
    yield _linear(f"{there}.up_proj", f"{here}.gate_up", hidden, dim, first + hidden)
    yield _linear(f"{there}.down_proj", f"{here}.down", dim, hidden, expert * dim)


def _linear(there: str, here: str, rows: int, columns: int, start: int = 0) -> Piece:
    return Piece(name=f"{there}.weight", shape=(rows, columns), address=f"{here}.weight", start=start, quantised=True)


def _norm(there: str, here: str, dim: int) -> Piece:
    return Piece(name=f"{there}.weight", shape=(dim,), address=f"{here}.weight")

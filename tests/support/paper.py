"""DeepSeek-V3 straight from its equations (arXiv:2412.19437): naive loops in float64, with autograd.

The independent witness: nothing here comes from the framework, and it goes token by token, head by head.

Every linear weight is [out, in] and y = W x. Rows of `kv_a` are [kv_rank | rope]; of `kv_b`, per head,
[nope | value]; of `q_b` and `q`, per head, [nope | rope]. Experts are `gate_up` [E, 2I, D], gate rows first,
and `down` [E, D, I].

Letters: S positions of one sequence, D model, H heads, E experts, I inner width, V vocabulary, T targets.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from attrs import frozen
from torch import Tensor

IGNORE = -100

Weights: TypeAlias = Mapping[str, Tensor]
Shapes: TypeAlias = dict[str, tuple[int, ...]]
Heads: TypeAlias = Sequence[Sequence[Tensor]]
"""A vector for each head of each token: [S][H]."""

Block: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A transformer block on one sequence: (h [S, D], positions [S], segments [S]) -> [S, D]."""


def linear(weight: Tensor, x: Tensor) -> Tensor:
    """Return W x for a vector x."""
    return weight.double() @ x.double()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x [..., D] over its root mean square, times `weight` [D]."""
    x = x.double()
    return weight.double() * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def fill(shapes: Shapes, seed: int, std: float = 0.3) -> dict[str, Tensor]:
    """Return normal weights of these shapes; norms lie around 1, so that a forgotten one is seen."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = std * torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[name] = 1 + noise if name.endswith("norm") else noise
    return weights


# --- rotary positions (section 4.3) -------------------------------------------------------------------------


@frozen(kw_only=True)
class Yarn:
    """YaRN: slow pairs are interpolated by `factor`, fast ones kept, a ramp between."""

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0

    def magnitude(self) -> float:
        """Return the factor whose square multiplies the softmax scale."""
        return 0.1 * self.mscale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def band(self, dim: int, theta: float) -> tuple[int, int]:
        """Return the pairs between which the ramp from kept to interpolated frequencies runs."""

        def pair_that_turns(times: float) -> float:
            return dim * math.log(self.original_length / (2 * math.pi * times)) / (2 * math.log(theta))

        low, high = math.floor(pair_that_turns(self.beta_fast)), math.ceil(pair_that_turns(self.beta_slow))
        return max(low, 0), min(high, dim - 1)


def frequency(pair: int, dim: int, theta: float, yarn: Yarn | None) -> float:
    """Return the radians by which `pair` turns from one position to the next."""
    plain = theta ** (-2 * pair / dim)
    if yarn is None:
        return plain
    low, high = yarn.band(dim, theta)
    ramp = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
    return plain * (1 - ramp) + plain / yarn.factor * ramp


def rope_interleaved(vector: Tensor, position: int, theta: float, yarn: Yarn | None = None) -> Tensor:
    """Return `vector` [R] with the neighbours 2i and 2i + 1 turned by position * frequency(i)."""
    dim, turned = len(vector), []
    for pair in range(dim // 2):
        angle = position * frequency(pair, dim, theta, yarn)
        x, y = vector[2 * pair], vector[2 * pair + 1]
        turned += [x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)]
    return torch.stack(turned)


# --- attention (equations 1 to 11) --------------------------------------------------------------------------


def attend(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float) -> Tensor:
    """Return one head's output for one token (equation 10)."""
    logits = torch.stack([scale * (query * key).sum() for key in keys])
    chances = torch.exp(logits - logits.max().detach())
    chances = chances / chances.sum()
    return torch.stack([chance * value for chance, value in zip(chances, values, strict=True)]).sum(0)


def attend_all(queries: Heads, keys: Heads, values: Heads, segments: Tensor, scale: float, output: Tensor) -> Tensor:
    """Return attention [S, D], each token seeing itself and the earlier ones of its segment (equation 11)."""
    rows = []
    for t, heads in enumerate(queries):
        seen = [j for j in range(t + 1) if int(segments[j]) == int(segments[t])]
        mixed = [
            attend(query, [keys[j][i] for j in seen], [values[j][i] for j in seen], scale)
            for i, query in enumerate(heads)
        ]
        rows.append(linear(output, torch.cat(mixed)))
    return torch.stack(rows)


@frozen(kw_only=True)
class MLAShape:
    """Widths of multi-head latent attention; the ranks are read off the weights."""

    n_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    theta: float = 10000.0
    eps: float = 1e-6
    yarn: Yarn | None = None

    def scale(self) -> float:
        """Return the softmax scale, YaRN's factor squared included."""
        magnitude = self.yarn.magnitude() if self.yarn else 1.0
        return (self.nope_dim + self.rope_dim) ** -0.5 * magnitude**2

    def weights(self, dim: int, q_rank: int | None, kv_rank: int) -> Shapes:
        """Return the shape of every weight; without a `q_rank` queries are not compressed."""
        head = self.nope_dim + self.rope_dim
        queries: Shapes = {"q": (self.n_heads * head, dim)}
        if q_rank is not None:
            queries = {"q_a": (q_rank, dim), "q_norm": (q_rank,), "q_b": (self.n_heads * head, q_rank)}
        return queries | {
            "kv_a": (kv_rank + self.rope_dim, dim),
            "kv_norm": (kv_rank,),
            "kv_b": (self.n_heads * (self.nope_dim + self.value_dim), kv_rank),
            "o": (dim, self.n_heads * self.value_dim),
        }


def mla_queries(h: Tensor, weights: Weights, shape: MLAShape, position: int) -> list[Tensor]:
    """Return the query of every head for one token (equations 6 to 9)."""
    if "q_a" in weights:
        q = linear(weights["q_b"], rms_norm(linear(weights["q_a"], h), weights["q_norm"], shape.eps))
    else:
        q = linear(weights["q"], h)
    heads = []
    for rows in q.split(shape.nope_dim + shape.rope_dim):
        nope, rope = rows[: shape.nope_dim], rows[shape.nope_dim :]
        heads.append(torch.cat([nope, rope_interleaved(rope, position, shape.theta, shape.yarn)]))
    return heads


def mla_keys_values(h: Tensor, weights: Weights, shape: MLAShape, position: int) -> list[list[Tensor]]:
    """Return the keys and the values of every head for one token (equations 1 to 5)."""
    kv_rank = len(weights["kv_norm"])
    joint = linear(weights["kv_a"], h)
    latent = rms_norm(joint[:kv_rank], weights["kv_norm"], shape.eps)
    shared_key = rope_interleaved(joint[kv_rank:], position, shape.theta, shape.yarn)
    keys, values = [], []
    for rows in linear(weights["kv_b"], latent).split(shape.nope_dim + shape.value_dim):
        keys.append(torch.cat([rows[: shape.nope_dim], shared_key]))
        values.append(rows[shape.nope_dim :])
    return [keys, values]


def mla(h: Tensor, weights: Weights, shape: MLAShape, positions: Tensor, segments: Tensor) -> Tensor:
    """Return multi-head latent attention [S, D] of h [S, D] (equations 1 to 11)."""
    steps = [int(position) for position in positions]
    queries = [mla_queries(x, weights, shape, step) for x, step in zip(h, steps, strict=True)]
    past = [mla_keys_values(x, weights, shape, step) for x, step in zip(h, steps, strict=True)]
    keys, values = [each[0] for each in past], [each[1] for each in past]
    return attend_all(queries, keys, values, segments, shape.scale(), weights["o"])


@frozen(kw_only=True)
class GQAShape:
    """Widths of grouped-query attention: head i reads key and value i * n_kv_heads // n_heads."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    theta: float = 10000.0

    def weights(self, dim: int) -> Shapes:
        """Return the shape of every weight."""
        whole, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {"q": (whole, dim), "k": (kv, dim), "v": (kv, dim), "o": (dim, whole)}


def gqa(h: Tensor, weights: Weights, shape: GQAShape, positions: Tensor, segments: Tensor) -> Tensor:
    """Return grouped-query attention [S, D] of h [S, D], whole heads rotated in neighbour pairs."""

    sources = [i * shape.n_kv_heads // shape.n_heads for i in range(shape.n_heads)]
    queries, keys, values = [], [], []
    for x, position in zip(h, positions, strict=True):
        q, k, v = (linear(weights[name], x).split(shape.head_dim) for name in ("q", "k", "v"))
        queries.append([rope_interleaved(head, int(position), shape.theta) for head in q])
        keys.append([rope_interleaved(k[source], int(position), shape.theta) for source in sources])
        values.append([v[source] for source in sources])
    return attend_all(queries, keys, values, segments, shape.head_dim**-0.5, weights["o"])


# --- mixture of experts (equations 12 to 20) ----------------------------------------------------------------


def best(scores: Sequence[float], among: Sequence[int], k: int) -> list[int]:
    """Return the k indices of `among` with the highest scores; of equals the first."""
    return sorted(among, key=lambda i: (-scores[i], i))[:k]


def allowed_experts(biased: Sequence[float], n_groups: int, top_groups: int) -> list[int]:
    """Return the experts of the groups whose two highest biased scores have the largest sums."""
    size = len(biased) // n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(n_groups)]
    sums = [sum(biased[i] for i in best(biased, group, 2)) for group in groups]
    return [i for g in best(sums, range(n_groups), top_groups) for i in groups[g]]


def route_group_limited(
    u: Tensor,
    centroids: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    score: Literal["sigmoid", "softmax"] = "sigmoid",
    normalise: bool = True,
) -> tuple[list[dict[int, Tensor]], Tensor]:
    """Return each token's {expert: gate}, and the affinities [S, E] normalised over E (equations 13 to 16).

    The bias [E] moves the choice of groups and of experts, never a gate. An expert outside the chosen groups
    is never chosen, however low the scores inside.
    """
    routes, affinities = [], []
    for token in u:
        logits = linear(centroids, token)
        affinity = torch.sigmoid(logits) if score == "sigmoid" else torch.softmax(logits, 0)
        biased = [s + b for s, b in zip(affinity.tolist(), bias.tolist(), strict=True)]
        chosen = best(biased, allowed_experts(biased, n_groups, top_groups), top_k)
        total = sum(affinity[i] for i in chosen) if normalise else 1.0
        routes.append({i: scale * affinity[i] / total for i in chosen})
        affinities.append(affinity / affinity.sum())
    return routes, torch.stack(affinities)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return W_down (silu(W_gate x) * W_up x) for x [D]; W_gate is the first half of `gate_up` [2I, D]."""
    gate, up = linear(gate_up, x).chunk(2)
    return linear(down, gate * torch.sigmoid(gate) * up)


def moe_weights(dim: int, n_experts: int, hidden: int, n_shared: int) -> Shapes:
    """Return the shape of every weight; the shared experts are one SwiGLU of their joint width."""
    shared: Shapes = {"shared_gate_up": (2 * n_shared * hidden, dim), "shared_down": (dim, n_shared * hidden)}
    routed: Shapes = {"gate_up": (n_experts, 2 * hidden, dim), "down": (n_experts, dim, hidden)}
    return {"centroids": (n_experts, dim)} | routed | (shared if n_shared else {})


def moe(u: Tensor, weights: Weights, routes: Sequence[Mapping[int, Tensor]]) -> Tensor:
    """Return shared plus gated routed experts [S, D] of u [S, D], without the residual (equation 12)."""
    outputs = []
    for token, route in zip(u, routes, strict=True):
        output = torch.zeros_like(token, dtype=torch.float64)
        for expert, gate in route.items():
            output = output + gate * swiglu(token, weights["gate_up"][expert], weights["down"][expert])
        if "shared_down" in weights:
            output = output + swiglu(token, weights["shared_gate_up"], weights["shared_down"])
        outputs.append(output)
    return torch.stack(outputs)


def balance_terms(
    affinities: Tensor, top_k: int, chosen: Sequence[Sequence[int]] | None = None
) -> tuple[list[float], Tensor]:
    """Return f [E] and P [E] of tokens with affinities [S, E], normalised or not (equations 18 to 20).

    `chosen` holds the experts to count for each token; by default its K best affinities, as in equation 18.
    """
    affinities = affinities.double()
    n_tokens, n_experts = affinities.shape
    if chosen is None:
        chosen = [best(token.tolist(), range(n_experts), top_k) for token in affinities]
    f, p = [0.0] * n_experts, torch.zeros(n_experts, dtype=torch.float64)
    for token, experts in zip(affinities, chosen, strict=True):
        p = p + token / token.sum() / n_tokens
        for i in experts:
            f[i] += n_experts / (top_k * n_tokens)
    return f, p


def sequence_balance(affinities: Tensor, top_k: int, chosen: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Return the balance loss of one sequence, alpha = 1 (equation 17); a batch takes the mean of its own."""
    f, p = balance_terms(affinities, top_k, chosen)
    return torch.stack([f[i] * p[i] for i in range(len(f))]).sum()


def batch_balance(affinities: Sequence[Tensor], top_k: int) -> Tensor:
    """Return the same loss with f and P over all tokens of the batch (section 4.5.3), each [S, E]."""
    return sequence_balance(torch.cat(list(affinities)), top_k)


def bias_update(bias: Tensor, load: Sequence[int], speed: float) -> Tensor:
    """Return the biases after a step: an overloaded expert's falls by `speed`, an underloaded one's rises."""
    mean = sum(load) / len(load)
    moves = [speed * ((mean > count) - (mean < count)) for count in load]
    return torch.stack([b + move for b, move in zip(bias.double(), moves, strict=True)])


# --- predicting tokens (equations 21 to 25) -----------------------------------------------------------------


def nats(logits: Tensor, target: int) -> Tensor:
    """Return -log softmax(logits)[target] for logits [V]."""
    return torch.logsumexp(logits.double(), 0) - logits.double()[target]


def next_token(logits: Tensor, targets: Tensor, n_targets: int | None = None) -> Tensor:
    """Return the cross entropy of logits [S, V] against targets [S], over T or the batch's `n_targets`."""
    pairs = zip(logits, targets.tolist(), strict=True)
    terms = [nats(row, target) for row, target in pairs if target != IGNORE]
    return sum(terms, torch.zeros((), dtype=torch.float64)) / (n_targets or len(terms))


@frozen(kw_only=True, eq=False)
class MTPDepth:
    """One depth: two norms of its inputs, the projection [D, 2D], the block, the norm before the head."""

    embedding_norm: Tensor
    hidden_norm: Tensor
    projection: Tensor
    block: Block
    output_norm: Tensor


def mtp(
    hidden: Tensor,
    tokens: Tensor,
    targets: Tensor,
    positions: Tensor,
    segments: Tensor,
    *,
    depths: Sequence[MTPDepth],
    embedding: Tensor,
    head: Tensor,
    eps: float = 1e-6,
    n_targets: int | None = None,
) -> Tensor:
    """Return the multi-token prediction loss of one sequence with lambda = 1 (equations 21 to 25).

    Depth k joins [norm(embedding of the token k ahead) ; norm(hidden)], in the released checkpoint's order,
    and predicts one token further. Positions whose token k ahead is in another segment, or beyond the end,
    take no part. What one depth hands the next is what the head reads: h^k after the norm, as h^0 is.

    Args:
        hidden: Trunk output after the final norm, [S, D].
        tokens, targets, positions, segments: [S]; a target is the next token or IGNORE.
        depths: One entry for each depth.
        embedding: The shared embedding, [V, D].
        head: The shared head, [V, D].
        eps: Of every norm.
        n_targets: What the sums are divided by: T, or the whole batch's count.
    """
    count = n_targets or sum(int(target) != IGNORE for target in targets)
    states = dict(enumerate(hidden))
    loss = torch.zeros((), dtype=torch.float64)
    for k, depth in enumerate(depths, start=1):
        kept = [p for p in range(len(tokens) - k) if int(segments[p]) == int(segments[p + k])]
        if not kept:
            break
        joined = []
        for p in kept:
            ahead = rms_norm(embedding[int(tokens[p + k])], depth.embedding_norm, eps)
            here = rms_norm(states[p], depth.hidden_norm, eps)
            joined.append(linear(depth.projection, torch.cat([ahead, here])))
        rows = depth.block(torch.stack(joined), positions[kept], segments[kept])
        states = {p: rms_norm(row, depth.output_norm, eps) for p, row in zip(kept, rows, strict=True)}
        for p in kept:
            if int(targets[p + k]) != IGNORE:
                loss = loss + nats(linear(head, states[p]), int(targets[p + k])) / count
    return loss / len(depths)

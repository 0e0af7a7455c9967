"""Choosing a token: the settings of a draw, the distribution they make of logits, and whether a draft is kept."""

from collections.abc import Sequence
from hashlib import sha256

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, le
from torch import Tensor


@frozen(kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Only so many of the likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that together have this probability (arXiv:1904.09751).
        min_p: Only tokens at least this often as probable as the likeliest (arXiv:2407.01082).
        repetition_penalty: Divides positive logits of tokens that are there already, and multiplies negative ones
            (arXiv:1909.05858, section 4.1).
        seed: Seed of the draws.
    """

    temperature: float = field(default=0.0, validator=ge(0.0))
    top_k: int = field(default=0, validator=ge(0))
    top_p: float = field(default=1.0, validator=[gt(0.0), le(1.0)])
    min_p: float = field(default=0.0, validator=[ge(0.0), le(1.0)])
    repetition_penalty: float = field(default=1.0, validator=gt(0.0))
    seed: int = 0

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the logits as they are is taken."""
        return self.temperature == 0 and self.repetition_penalty == 1


def uniform(seed: int, count: int) -> float:
    """Return draw number `count` of a seed, in [0, 1): of a sequence alone, whoever is drawn for beside it."""
    digest = sha256(f"{seed}:{count}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / float(1 << 53)


def distribution(logits: Tensor, samplings: Sequence[Sampling], seen: Sequence[Sequence[int]]) -> Tensor:
    """Return the probabilities float64 [B, V] with which the tokens are drawn.

    The filters are applied in this order, each to what the one before left: repetition, temperature, top_k, top_p,
    min_p.

    Args:
        logits: Of each sequence's next token, [B, V].
        samplings: How each sequence is drawn.
        seen: The tokens that each sequence has.
    """
    logits = logits.double()
    penalties = [each.repetition_penalty for each in samplings]
    if any(penalty != 1 for penalty in penalties):
        logits = logits.clone()
        for row, (penalty, tokens) in enumerate(zip(penalties, seen, strict=True)):
            if penalty != 1:
                there = torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=logits.device)
                found = logits[row, there]
                logits[row, there] = torch.where(found > 0, found / penalty, found * penalty)

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    greedy = column([each.temperature == 0 for each in samplings]).bool()
    certain = torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    scaled = logits / column([each.temperature or 1.0 for each in samplings])
    if any(each.top_k or each.top_p < 1 for each in samplings):
        ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
        size = logits.shape[1]
        rank = torch.arange(size, device=logits.device)
        dropped = rank >= column([each.top_k or size for each in samplings])
        share = ordered.masked_fill(dropped, -torch.inf).softmax(-1)
        # A token goes if those before it have the probability already: the likeliest always stays.
        dropped |= share.cumsum(-1) - share >= column([each.top_p if each.top_p < 1 else 2.0 for each in samplings])
        scaled = scaled.masked_fill(torch.zeros_like(dropped).scatter_(1, order, dropped), -torch.inf)
    shares = scaled.softmax(-1)
    if any(each.min_p for each in samplings):
        least = column([each.min_p for each in samplings]) * shares.amax(-1, keepdim=True)
        shares = shares.masked_fill(shares < least, 0.0)
        shares = shares / shares.sum(-1, keepdim=True)
    return torch.where(greedy, certain, shares)


def drawn(shares: Tensor, uniforms: Sequence[float]) -> list[int]:
    """Return a token for each row of probabilities or other weights [B, V], given numbers in [0, 1)."""
    sums = shares.cumsum(-1)
    # A number falls on a token if it lies in the token's part of the whole; so none without weight is ever drawn.
    at = torch.tensor(uniforms, dtype=sums.dtype, device=sums.device)[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, at, right=True)[:, 0]
    last = shares.shape[1] - 1 - (shares > 0).flip(-1).int().argmax(-1)
    return torch.minimum(found, last).tolist()


def left_over(wanted: Tensor, guessed: Tensor) -> Tensor:
    """Return what to draw from when a draft is refused, unnormalised [B, V]: where the draft's shares are too small.

    With it, a token drafted with probability q and kept with probability min(1, p / q) has probability p
    (arXiv:2211.17192, section 2.3).

    Args:
        wanted: Probabilities p [B, V].
        guessed: Probabilities q [B, V] that the draft was drawn with.
    """
    rest = (wanted - guessed).clamp_min(0.0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, wanted)  # only rounding leaves nothing

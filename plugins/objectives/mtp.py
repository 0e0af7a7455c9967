"""Multi-token prediction (arXiv:2412.19437, section 2.2, equations 21 to 25)."""

from collections.abc import Callable
from typing import Literal

import torch
from attrs import evolve, field, frozen
from attrs.validators import gt, in_
from torch import Tensor, nn

from tangram.core.block import Block
from tangram.core.context import Context
from tangram.core.contracts import Cache, FeedForward, Objective, Shared, TokenObjective
from tangram.core.curve import Curve
from tangram.core.experiment import BlockConfig
from tangram.core.layers import Linear, norm
from tangram.core.records import IGNORE, Batch, Carry, Loss, Phase
from tangram.core.registry import component


@component("objective", use="mtp")
@frozen(kw_only=True)
class MTPConfig:
    """Predict further tokens, each by one more block that sees the one before and the next embedding.

    Attributes:
        depth: Further tokens D.
        weight: Weight lambda of the loss; a number or a curve over tokens.
        input: What a depth reads of the one before: `post_norm`, after the norm in front of the head (as serving
            engines feed it), or `pre_norm`, the residual stream. The paper leaves it open.
    """

    depth: int = field(default=1, validator=gt(0))
    weight: Curve = field(default=Curve.constant(0.3))
    input: Literal["post_norm", "pre_norm"] = field(default="post_norm", validator=in_(("post_norm", "pre_norm")))

    def build(self, ctx: Context, block: BlockConfig) -> Objective:
        """Build it."""
        return MTP(self, ctx, block)


class Depth(nn.Module):
    """One MTP module: M_k [norm(embedding) ; norm(hidden)], a block, and the norm in front of the shared head.

    The columns of the projection stand in the order of the released weights; equation 21 prints the other one.
    """

    def __init__(self, ctx: Context, block: BlockConfig) -> None:
        super().__init__()
        self.embedding_norm = norm(ctx, ctx.dim)
        self.hidden_norm = norm(ctx, ctx.dim)
        self.projection = Linear(ctx, 2 * ctx.dim, ctx.dim)
        self.block = Block(block, ctx)
        self.norm = norm(ctx, ctx.dim)

    def join(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Return the block's input [B, S, D] (equation 21)."""
        return self.projection(torch.cat([self.embedding_norm(embedding), self.hidden_norm(hidden)], -1))


class MTP(TokenObjective):
    """The mean over depths of their cross entropies, each divided by the global number of targets T.

    Every depth keeps all S positions; the last k, whose target lies beyond the sequence, are masked, and so is
    what would cross from one document to another. T does not shrink with the mask (equation 24).
    """

    embeds = True

    def __init__(self, config: MTPConfig, ctx: Context, block: BlockConfig) -> None:
        super().__init__()
        self.curve, self.post_norm = config.weight, config.input == "post_norm"
        self.depths = nn.ModuleList(Depth(ctx.at(ctx.layer + k), block) for k in range(config.depth))

    @property
    def depth(self) -> int:
        """Modules."""
        return len(self.depths)

    def new_cache(self, k: int, batch: int, length: int) -> Cache:
        """Return an empty cache of module k."""
        return self._modules_in_order()[k - 1].block.attention.new_cache(batch, length)

    def draft(self, k: int, hidden: Tensor, tokens: Tensor, positions: Tensor, cache: Cache, shared: Shared) -> Tensor:
        """Return the residual stream [B, S, D] after module k, as training computes it."""
        modules = self._modules_in_order()
        if self.post_norm:
            hidden = (shared.norm if k == 1 else modules[k - 2].norm)(hidden)
        joined = modules[k - 1].join(hidden, shared.embedding(tokens))
        return modules[k - 1].block(joined, positions, torch.zeros_like(positions), cache).hidden

    def logits(self, k: int, hidden: Tensor, shared: Shared) -> Tensor:
        """Return the logits [B, S, V] of module k."""
        return shared.head(self._modules_in_order()[k - 1].norm(hidden))

    def feedforwards(self) -> list[FeedForward]:
        """Return the feed-forwards of the MTP blocks, whose experts are balanced like the trunk's."""
        return [depth.block.feedforward for depth in self._modules_in_order()]

    def _modules_in_order(self) -> list[Depth]:
        return [depth for depth in self.depths if isinstance(depth, Depth)]

    def forward(self, trunk: Tensor, batch: Batch, shared: Shared) -> Loss:
        """Return the loss of trunk [B, S, D]: the phases in order."""
        carry = Carry(hidden=trunk, trunk=trunk)
        for phase in self.phases("mtp", batch, shared):
            carry = phase.fn(carry)
        return carry.losses[-1][1]

    def phases(self, name: str, batch: Batch, shared: Shared) -> list[Phase]:
        """Return for each depth: join, its block's four phases, score."""
        phases: list[Phase] = []
        before: nn.Module = shared.norm
        for k, depth in enumerate(self._modules_in_order(), start=1):
            phases.append(Phase("join", "compute", self._join(k, depth, before, batch, shared)))
            phases += depth.block.phases(batch.positions, batch.segments)
            phases.append(Phase("score", "compute", self._score(k, depth, name, batch, shared)))
            before = depth.norm
        return phases

    def _join(self, k: int, depth: Depth, before: nn.Module, batch: Batch, shared: Shared) -> Callable[[Carry], Carry]:
        def join(carry: Carry) -> Carry:
            hidden = carry.trunk if k == 1 else carry.hidden
            assert hidden is not None
            if self.post_norm:
                hidden = before(hidden)
            # The wrapped tokens at the end stand at masked positions, which no other position sees.
            embedding = shared.embedding(batch.tokens.roll(-k, 1))
            return evolve(carry, hidden=depth.join(hidden, embedding))

        return join

    def _score(self, k: int, depth: Depth, name: str, batch: Batch, shared: Shared) -> Callable[[Carry], Carry]:
        def score(carry: Carry) -> Carry:
            assert carry.hidden is not None
            loss = shared.head.loss(depth.norm(carry.hidden), further_targets(batch, k), batch.n_targets)
            loss = loss / len(self.depths)  # equation 25
            before = dict(carry.losses).get(name)
            total = loss if before is None else before.value + loss
            others = tuple(item for item in carry.losses if item[0] != name)
            return evolve(carry, losses=(*others, (name, Loss(total))))

        return score


def further_targets(batch: Batch, k: int) -> Tensor:
    """Return the targets [B, S] k tokens further, IGNORE where that lies beyond the sequence or the document."""
    assert batch.targets is not None
    further = torch.full_like(batch.targets, IGNORE)
    same = batch.segments[:, :-k] == batch.segments[:, k:]
    further[:, :-k] = torch.where(same, batch.targets[:, k:], IGNORE)
    return further

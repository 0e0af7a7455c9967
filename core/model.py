"""The decoder: embedding, blocks, norm and head, and the objectives that read the trunk."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from attrs import evolve
from torch import Tensor, nn

from tangram.core.autograd import Recompute
from tangram.core.block import Block
from tangram.core.context import Context, Parallel, built
from tangram.core.contracts import Cache, FeedForward, RoutingObjective, Shared, TokenObjective
from tangram.core.experiment import Experiment
from tangram.core.layers import OutputHead, RMSNorm, TokenEmbedding, norm
from tangram.core.plan import split
from tangram.core.records import Batch, Carry, Loss, Phase, Progress, one_document


class Model(nn.Module):
    """A `Program` of stages of consecutive blocks, the first with the embedding and the last with the objectives.

    It holds the stages, and of the experts the share, that the layout gives this rank. Addresses of parameters are
    those of the whole model (`blocks.7.attention...`), whatever the layout.

    Args:
        experiment: The resolved preset.
        parallel: Where the work runs.

    Attributes:
        around: What is done around the phases of a stage; a sharding that does not keep all parameters whole sets it.
        expert_ranks: Ranks that share out the experts, this one among them.
        experts: Routed experts of every layer of the whole model; 0 where there is no router.
        on_tokens: Names of the losses on tokens of the whole model.

    Raises:
        ValueError: There are more stages than layers.
    """

    def __init__(self, experiment: Experiment, parallel: Parallel) -> None:
        super().__init__()
        config, layout = experiment.model, parallel.layout
        self.n_stages, self.expert_ranks = layout.n_stages, layout.expert_ranks
        self._layers = split(config.n_layers, self.n_stages)
        self.dim = config.dim
        self.around: Callable[[list[Phase]], list[Phase]] = list  # as they are
        self.n_layers, self.recompute = config.n_layers, Recompute(config.recompute)
        ctx = Context(
            dim=config.dim,
            n_layers=config.n_layers,
            init_std=config.init_std,
            norm_eps=config.norm_eps,
            precision=built("precision", experiment.precision.build),
            recompute=self.recompute,
            parallel=parallel,
        )
        self.compute = ctx.precision.compute
        self.embedding: TokenEmbedding | None = TokenEmbedding(ctx, config.vocab_size)
        layer = 0
        self.blocks = nn.ModuleDict()
        for number, group in enumerate(config.blocks):
            for _ in range(group.repeat):
                self.blocks[str(layer)] = built(f"model.blocks.{number}", Block, group.block, ctx.at(layer))
                layer += 1
        self.norm: RMSNorm | None = norm(ctx, config.dim)
        self.head: OutputHead | None = OutputHead(ctx, config.vocab_size)
        self.objectives = nn.ModuleDict()
        self.routing_objectives: dict[str, RoutingObjective] = {}
        for name, wanted in experiment.objectives.items():
            objective = built(f"objectives.{name}", wanted.build, ctx.at(layer), config.block)
            if isinstance(objective, TokenObjective):
                self.objectives[name] = objective
                layer += len(objective.feedforwards())
            else:
                self.routing_objectives[name] = objective
        self.experts = tuple(feedforward.n_experts for feedforward in self.feedforwards().values())
        self.on_tokens = tuple(self.objectives)
        self._weights = {name: objective.weight for name, objective in self.token_objectives()}
        self._weights |= {name: objective.weight for name, objective in self.routing_objectives.items()}
        embeds = any(objective.embeds for _, objective in self.token_objectives())
        self._embedding_stages = frozenset({0, self.n_stages - 1} if embeds else {0})
        self._keep(layout.stages)

    def _keep(self, stages: Collection[int]) -> None:
        """Let go of what these stages do not use."""
        for layer, _ in list(self.trunk()):
            if self._stage(layer) not in stages:
                del self.blocks[str(layer)]
        if not self._embedding_stages & set(stages):
            self.embedding = None
        if self.n_stages - 1 not in stages:
            self.norm = self.head = None
            self.objectives = nn.ModuleDict()

    def _stage(self, layer: int) -> int:
        return next(stage for stage, layers in enumerate(self._layers) if layer in layers)

    def stages_of(self, address: str) -> frozenset[int]:
        """Return the stages that use the parameter of an address: more than one where it is tied."""
        part, _, rest = address.partition(".")
        if part == "blocks":
            return frozenset({self._stage(int(rest.partition(".")[0]))})
        return self._embedding_stages if part == "embedding" else frozenset({self.n_stages - 1})

    def shares(self) -> dict[str, range]:
        """Return which experts this rank holds, for each address of a parameter that belongs to experts."""
        return {
            f"{address}.{name}": module.experts
            for address, module in self.named_modules()
            if getattr(module, "axis", "") == "expert"
            for name, _ in module.named_parameters(recurse=False)
        }

    def token_objectives(self) -> Iterator[tuple[str, TokenObjective]]:
        """Yield the losses on tokens, by name."""
        for name, objective in self.objectives.items():
            assert isinstance(objective, TokenObjective)
            yield name, objective

    def trunk(self) -> Iterator[tuple[int, Block]]:
        """Yield the trunk's blocks with their layer."""
        for layer, block in self.blocks.items():
            assert isinstance(block, Block)
            yield int(layer), block

    def feedforwards(self) -> dict[int, FeedForward]:
        """Return every feed-forward that is held here by layer: the trunk's, then those that objectives own."""
        owned = [feedforward for _, objective in self.token_objectives() for feedforward in objective.feedforwards()]
        held = {layer: block.feedforward for layer, block in self.trunk()}
        return held | dict(enumerate(owned, start=self.n_layers))

    @property
    def shared(self) -> Shared:
        """What token objectives borrow."""
        assert self.norm is not None and self.head is not None
        return Shared(self.embedding, self.norm, self.head)

    @property
    def load_shape(self) -> tuple[int, int]:
        """Layers (with those of the objectives) and the largest number of experts."""
        return len(self.experts), max(self.experts)

    def weights(self, now: Progress) -> Mapping[str, float]:
        """Return each loss's weight at `now`, wherever it is computed."""
        return {name: weight(now) for name, weight in self._weights.items()}

    def phases(self, stage: int, batch: Batch, now: Progress, caches: Sequence[Cache] | None = None) -> list[Phase]:
        """Return the forward of a stage as phases; without targets the last one ends with the trunk, for decoding."""
        phases: list[Phase] = []
        if stage == 0:
            phases.append(Phase("embed", "compute", self._embed(batch.tokens)))
        for layer, block in self.trunk():
            if layer in self._layers[stage]:
                phases += block.phases(batch.positions, batch.segments, caches[layer] if caches else None)
        last = stage == self.n_stages - 1
        if last:
            phases.append(Phase("trunk", "compute", lambda carry: evolve(carry, trunk=carry.hidden)))
        if batch.targets is not None:
            weights = self.weights(now)
            for name, objective in self.token_objectives():
                if last and weights[name]:
                    phases += objective.phases(name, batch, self.shared)
            named = {name: loss for name, loss in self.routing_objectives.items() if weights[name]}
            if named:
                phases.append(Phase("routing", "compute", _routing(named, batch)))
        return self.around([phase._replace(fn=self._scoped(phase.fn)) for phase in phases])

    def _embed(self, tokens: Tensor) -> Callable[[Carry], Carry]:
        embedding = self.embedding
        assert embedding is not None
        return lambda carry: evolve(carry, hidden=embedding(tokens))

    def _scoped(self, fn: Callable[[Carry], Carry]) -> Callable[[Carry], Carry]:
        def run(carry: Carry) -> Carry:
            with self.recompute.scope():
                return fn(carry)

        return run

    def forward(self, batch: Batch, now: Progress, caches: Sequence[Cache] | None = None) -> Carry:
        """Return the carry after all phases of the last stage."""
        carry = Carry()
        for stage in range(self.n_stages):
            carry = Carry(hidden=carry.hidden)
            for phase in self.phases(stage, batch, now, caches):
                carry = phase.fn(carry)
        return carry

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, S, V], at least float32, of tokens int64 [B, S], each row one document."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        batch = Batch(tokens, None, positions, one_document(tokens), 0, len(tokens))
        trunk = self(batch, Progress()).trunk
        shared = self.shared
        return shared.head(shared.norm(trunk))

    def rebalance(self, load: Tensor, now: Progress) -> None:
        """Move the expert biases, given the global load int64 [layers, E]."""
        for layer, feedforward in self.feedforwards().items():
            if feedforward.n_experts:
                feedforward.rebalance(load[layer, : feedforward.n_experts], now)

    def biases(self) -> dict[int, Tensor]:
        """Return the expert biases [E] of every layer that is held here and whose balancer moves them."""
        balancers = {layer: feedforward.balancer for layer, feedforward in self.feedforwards().items()}
        return {layer: found.bias() for layer, found in balancers.items() if found is not None and found.adaptive}


def _routing(objectives: Mapping[str, RoutingObjective], batch: Batch) -> Callable[[Carry], Carry]:
    def run(carry: Carry) -> Carry:
        losses = [
            (name, Loss(torch.stack([loss(stats, batch) for _, stats in carry.stats]).sum()))
            for name, loss in objectives.items()
            if carry.stats
        ]
        return evolve(carry, losses=(*carry.losses, *losses))

    return run


def initialize(model: nn.Module, seed: int, device: str | torch.device = "cpu") -> None:
    """Give every weight its initial value, and put it on a device.

    Each module draws from its own address and on the CPU, so that neither a layout nor a device changes a value.

    Raises:
        TypeError: A module has parameters or buffers of its own and no `reset_parameters`.
    """
    for address, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not own:
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise TypeError(f"{address}: {type(module).__name__} has weights and no reset_parameters()")
        digest = hashlib.sha256(f"{seed}:{address}".encode()).digest()
        # As `to_empty` does it, which imports torch's symbolic shapes to make one tensor like another without memory.
        module._apply(lambda bare: torch.empty(bare.shape, dtype=bare.dtype), recurse=False)
        with torch.random.fork_rng(devices=[]):
            # `torch.manual_seed` writes down a traceback for each accelerator that is not there: most of a small build.
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            reset()
        module._apply(lambda drawn: drawn.to(device), recurse=False)


def build_model(
    experiment: Experiment, seed: int = 0, device: str | torch.device = "cpu", parallel: Parallel | None = None
) -> Model:
    """Build what a rank holds of an experiment's model, with its initial weights; on device `meta` without any.

    The weights do not depend on the layout.

    Raises:
        BuildError: A component refuses its surroundings; the message begins with its dotted path.
    """
    with torch.device("meta"):
        model = Model(experiment, parallel or Parallel())
    if str(device) != "meta":
        initialize(model, seed, device)
    return model

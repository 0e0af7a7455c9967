"""What a model costs, counted on the meta device: parameters, cache and operations."""

from attrs import asdict, frozen
from torch import nn

from tangram.core.experiment import Experiment
from tangram.core.model import Model, build_model


@frozen
class Parameters:
    """How many weights. Router biases count, as they do in the published totals.

    Attributes:
        total: The main model: embedding, blocks, norm and head.
        active: What one token passes through, without the embedding, with the head.
        embedding: The embedding.
        head: The output projection.
        attention: All attentions of the trunk.
        feedforward: All feed-forwards of the trunk, experts, routers and their biases included.
        mtp: What the token objectives own, beyond the embedding and head they share.
    """

    total: int
    active: int
    embedding: int
    head: int
    attention: int
    feedforward: int
    mtp: int


@frozen
class Measures:
    """The costs of an experiment.

    Attributes:
        parameters: How many weights.
        kv_cache_bytes_per_token: Bytes that all attentions of the trunk cache for one token, in the compute dtype.
        training_flops_per_token: Operations of forward and backward for one token at the training length: six
            times the active parameters, and three times the products between tokens under a causal mask.
    """

    parameters: Parameters
    kv_cache_bytes_per_token: int
    training_flops_per_token: int

    def as_dict(self) -> dict[str, object]:
        """Return the measures as nested plain values."""
        return asdict(self)


def measure(experiment: Experiment) -> Measures:
    """Count the costs of an experiment, without weights.

    Raises:
        BuildError: A component refuses its surroundings.
    """
    model = build_model(experiment, device="meta")
    parameters = _parameters(model)
    blocks = [block for _, block in model.trunk()]
    width = sum(block.attention.cache_width for block in blocks)
    # A token at position p sees p others: half the length on average, which the factor 2 of one side undoes.
    seen = experiment.train.sequence_length
    products = sum(block.attention.core_flops(seen) for block in blocks) // 2
    return Measures(
        parameters=parameters,
        kv_cache_bytes_per_token=width * model.compute.itemsize,
        training_flops_per_token=6 * parameters.active + 3 * products,
    )


def _parameters(model: Model) -> Parameters:
    blocks = [block for _, block in model.trunk()]
    embedding, head, owned = count(model.shared.embedding), count(model.shared.head), count(model.objectives)
    total = count(model) - owned
    idle = sum(count(block.feedforward) - block.feedforward.active_parameters() for block in blocks)
    return Parameters(
        total=total,
        active=total - embedding - idle,
        embedding=embedding,
        head=head,
        attention=sum(count(block.attention) for block in blocks),
        feedforward=sum(count(block.feedforward) for block in blocks),
        mtp=owned,
    )


def count(module: nn.Module) -> int:
    """Return the number of weights and router biases of a module: all that its state dict holds."""
    return sum(tensor.numel() for tensor in module.state_dict(keep_vars=True).values())

"""What a forward keeps for its backward, counted in bytes: on tensors, or ahead of time on tensors without memory."""

from collections.abc import Sequence

import torch
from attrs import evolve
from torch.multiprocessing.reductions import StorageWeakRef

from tangram.core.experiment import RECOMPUTE, BlockGroup, Experiment
from tangram.core.model import Model, build_model
from tangram.core.records import Batch, Progress
from tangram.kernels import SeesOperations, place_of, tensors_in


class UnpredictableError(Exception):
    """A forward cannot run without memory: it looks at values."""


class Made(SeesOperations):
    """Counts what operations inside it make, without holding it: new storages, neither views nor what was there."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        given = set(map(place_of, tensors_in((args, kwargs))))
        for tensor in tensors_in(out):
            if place_of(tensor) not in given:
                storage = tensor.untyped_storage()
                # A weak reference keeps the place of its storage from being taken by another.
                self._made.setdefault(place_of(tensor), (StorageWeakRef(storage), storage.nbytes()))
        return out

    def alive(self) -> int:
        """Return the bytes of what is still alive."""
        return sum(size for made, size in self._made.values() if not made.expired())


def kept_bytes(model: Model, batch: Batch) -> int:
    """Return the bytes that a forward of the model on `batch` leaves alive for its backward.

    Parameters and the batch are not counted; what the losses keep at the head is.
    """
    with Made() as made:
        carry = model(batch, Progress())
    alive: int = made.alive()
    assert carry.losses  # the graph hangs on them
    del carry
    stays: int = made.alive()  # tables that are made once
    return alive - stays


def predict(experiment: Experiment) -> dict[str, int]:
    """Return the bytes that a forward of one micro-batch keeps for its backward, for each setting of `recompute`.

    The model runs without memory, every sequence one document, with the losses of the first step. Blocks of one group
    are taken to keep as much as its second.

    Raises:
        BuildError: A component refuses its surroundings.
        UnpredictableError: A component looks at values in its forward.
    """
    return {recompute: _predicted(experiment, recompute) for recompute in RECOMPUTE}


def _predicted(experiment: Experiment, recompute: str) -> int:
    def kept(groups: Sequence[BlockGroup]) -> int:
        model = evolve(experiment.model, blocks=tuple(groups), recompute=recompute)
        return _without_memory(evolve(experiment, model=model))

    groups = experiment.model.blocks
    single = [evolve(group, repeat=1) for group in groups]
    total = one_each = kept(single)
    for number, group in enumerate(groups):
        if group.repeat > 1:
            double = [*single[:number], evolve(group, repeat=2), *single[number + 1 :]]
            total += (group.repeat - 1) * (kept(double) - one_each)
    return total


def _without_memory(experiment: Experiment) -> int:
    train, model = experiment.train, build_model(experiment, device="meta")
    tokens = torch.empty(train.micro_sequences, train.sequence_length, dtype=torch.int64, device="meta")
    batch = Batch(tokens, tokens, tokens, tokens, n_targets=tokens.numel(), n_sequences=len(tokens))
    try:
        return kept_bytes(model, batch)
    except RuntimeError as error:
        raise UnpredictableError(str(error).partition("\n")[0]) from error

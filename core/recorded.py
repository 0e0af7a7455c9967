"""What continues sequences, run from a recording once its calls have become alike.

A model goes through some hundred operations for a token, each of microseconds, and most of the time would go to finding
out which is next. After a few calls of one shape they are recorded (tangram.kernels.replay); what a call then takes
from Python is room in the caches, and one call for each operation.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from attrs import frozen
from torch import Tensor

from tangram.core.contracts import Cache, SteadyCache
from tangram.kernels import Recording, record, records

_ALIKE = 3
"""Calls of one shape before one is recorded, which takes as long as some calls."""

_Shapes = tuple[torch.Size, ...]


@frozen(eq=False)
class _Call:
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    recording: Recording
    memory: list[Tensor]


class Recorded:
    """A function of tensors [B, S, ...] that appends S tokens to each of the B sequences of every cache.

    Args:
        fn: The function. Beside the caches it depends on its arguments alone.
        caches: The caches; as long as this is used, what they hold changes only by it and by truncation.
    """

    def __init__(self, fn: Callable[..., tuple[Tensor, ...]], caches: Sequence[Cache]) -> None:
        self._fn = fn
        self._caches = [cache for cache in caches if isinstance(cache, SteadyCache)]
        self._whole = bool(caches) and len(self._caches) == len(caches)
        self._seen: Counter[_Shapes] = Counter()
        self._calls: dict[_Shapes, _Call] = {}

    def again(self, *inputs: Tensor) -> tuple[Tensor, ...] | None:
        """Return what the function gives, from a recording, or None if there is none and nothing was done.

        The call after which enough have been alike is done, and recorded.
        """
        count = inputs[0].shape[1]
        if not (self._whole and records(inputs[0]) and all(cache.steady(count) for cache in self._caches)):
            return None
        shapes = tuple(each.shape for each in inputs)
        memory = [cache.reserve(count) for cache in self._caches]
        found = self._calls.get(shapes)
        if found is None or any(one is not other for one, other in zip(found.memory, memory, strict=True)):
            return self._record(shapes, inputs, memory)
        for own, given in zip(found.inputs, inputs, strict=True):
            own.copy_(given)
        found.recording.replay()
        for cache in self._caches:
            cache.advance(count)
        return tuple(output.clone() for output in found.outputs)

    def _record(self, shapes: _Shapes, inputs: tuple[Tensor, ...], memory: list[Tensor]) -> tuple[Tensor, ...] | None:
        if self._calls.pop(shapes, None):  # its memory has moved
            del self._seen[shapes]
        self._seen[shapes] += 1
        if self._seen[shapes] != _ALIKE:
            return None
        own = tuple(each.clone() for each in inputs)
        outputs, recording = record(lambda: self._fn(*own))
        if recording.refused is None:
            self._calls[shapes] = _Call(own, outputs, recording, memory)
        return tuple(output.clone() for output in outputs)

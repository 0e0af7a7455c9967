"""Messages between the ranks of a pipeline, over torch.distributed."""

from collections.abc import Callable

import torch
from torch import Tensor, distributed

from tangram.core.context import Parallel
from tangram.core.lowering import Message
from tangram.core.plan import Slot


class Channels:
    """Sends and receives hidden states and their gradients, none of which waits for another.

    Args:
        shape: Shape of what is sent for a slot, [B, S, D].
        dtype: Its dtype.
        parallel: Which rank this is, and where it computes.
        stages: Stages of the plan, by which messages are numbered.
    """

    def __init__(
        self, shape: Callable[[Slot], tuple[int, ...]], dtype: torch.dtype, parallel: Parallel, stages: int
    ) -> None:
        self._shape, self._dtype, self._parallel, self._stages = shape, dtype, parallel, stages
        self._coming: dict[Message, tuple[distributed.Work, Tensor]] = {}
        self._going: list[tuple[distributed.Work, Tensor]] = []

    def send(self, message: Message, tensor: Tensor) -> None:
        """Give a tensor to the network; it must not be written until `close`."""
        whole = tensor.detach().contiguous()
        work = distributed.isend(whole, self._parallel.layout.at(message.target), tag=self._tag(message))
        assert work is not None
        self._going.append((work, whole))

    def receive(self, message: Message) -> None:
        """Say where a message is to be put."""
        room = torch.empty(self._shape(message.slot), dtype=self._dtype, device=self._parallel.device)
        work = distributed.irecv(room, self._parallel.layout.at(message.source), tag=self._tag(message))
        assert work is not None
        self._coming[message] = work, room

    def take(self, message: Message) -> Tensor:
        """Wait for a message and return what it brought."""
        work, room = self._coming.pop(message)
        work.wait()
        return room

    def close(self) -> None:
        """Wait until all that was sent is gone."""
        for work, _ in self._going:
            work.wait()
        self._going.clear()

    def _tag(self, message: Message) -> int:
        """Return a number that no other message of a step has: a network that heeds it cannot mix two up."""
        slot = message.slot
        return ((slot.microbatch * self._stages + slot.stage) * 2 + slot.flow) * 2 + message.backward

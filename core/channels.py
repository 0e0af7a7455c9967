"""Messages between the ranks of a pipeline, over torch.distributed.

Over NCCL two ranks of a group have one queue for what they send each other, in both directions, and a send ends when it
is received: two that send first and then receive wait for ever. So messages towards higher ranks and messages towards
lower ranks go through groups of their own. And the first message between two ranks of a group waits until the other one
turns to it too: ranks that turn to different neighbours wait for ever. So channels are opened in one order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from tangram.core.context import Parallel
from tangram.core.lowering import Message


class Channels:
    """Sends and receives hidden states and their gradients, none of which waits for another.

    Args:
        dtype: Dtype of what is sent.
        parallel: Which rank this is, and where it computes.
        stages: Stages of the plan, by which messages are numbered.
    """

    def __init__(self, dtype: torch.dtype, parallel: Parallel, stages: int) -> None:
        self._dtype, self._parallel, self._stages = dtype, parallel, stages
        self._coming: dict[Message, tuple[distributed.Work, Tensor]] = {}
        self._going: list[tuple[distributed.Work, Tensor]] = []
        for way in ("up", "down"):
            parallel.groups.want(parallel.layout.pipeline, way)

    def open(self, channels: Sequence[tuple[int, int]]) -> None:
        """Have a number pass from each source to its target; all ranks of the pipeline must call this at once."""
        layout, number = self._parallel.layout, torch.zeros(1, device=self._parallel.device)
        for source, target in channels:
            if layout.pipeline_rank == source:
                distributed.send(number, layout.at(target), self._group(source, target))
            elif layout.pipeline_rank == target:
                distributed.recv(number, layout.at(source), self._group(source, target))

    def send(self, message: Message, tensor: Tensor) -> None:
        """Give a tensor to the network; it must not be written until `flush`."""
        whole = tensor.detach().contiguous()
        group = self._group(message.source, message.target)
        work = distributed.isend(whole, self._parallel.layout.at(message.target), group, self._tag(message))
        assert work is not None
        self._going.append((work, whole))

    def receive(self, message: Message, shape: Sequence[int]) -> None:
        """Say where a message of a shape, [B, S, D], is to be put."""
        room = torch.empty(shape, dtype=self._dtype, device=self._parallel.device)
        group = self._group(message.source, message.target)
        work = distributed.irecv(room, self._parallel.layout.at(message.source), group, self._tag(message))
        assert work is not None
        self._coming[message] = work, room

    def take(self, message: Message) -> Tensor:
        """Wait for a message and return what it brought."""
        work, room = self._coming.pop(message)
        work.wait()
        return room

    def flush(self) -> None:
        """Wait until all that was sent is gone."""
        for work, _ in self._going:
            work.wait()
        self._going.clear()

    def _group(self, source: int, target: int) -> distributed.ProcessGroup:
        return self._parallel.groups.of(self._parallel.layout.pipeline, "up" if source < target else "down")

    def _tag(self, message: Message) -> int:
        """Return a number that no other message of a step has: a network that heeds it cannot mix two up."""
        slot = message.slot
        return ((slot.microbatch * self._stages + slot.stage) * 2 + slot.flow) * 2 + message.backward

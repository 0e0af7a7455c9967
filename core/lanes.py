"""Works that go side by side, phase by phase, so that what one sends travels while the other computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tangram.core.islands import tensors


class Lanes:
    """Where the phases of a device run: those that compute in its current stream, those that communicate in another.

    A CPU has no streams: what is done here is done at once.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._streams = None if device.type == "cpu" else torch.get_device_module(device)
        self._aside = None if self._streams is None else self._streams.Stream(device)

    def side_by_side(self, *works: Iterator[str]) -> None:
        """Take works phase by phase in turn; of phases that are next, those that compute are issued first.

        A work yields the lane of its next phase, and does that phase when asked for the one after it. On a device each
        phase waits for the one before it in its work and for no other, so what communicates runs while what was issued
        before it computes. Whatever comes after all works waits for them.
        """
        lanes = {work: lane for work in works if (lane := next(work, None)) is not None}
        done: dict[Iterator[str], torch.Event | None] = dict.fromkeys(lanes, self._now())
        while lanes:
            for work in sorted(lanes, key=lambda work: lanes[work] != "compute"):
                with self._within(lanes[work], done[work]):
                    lane = next(work, None)
                    done[work] = self._now()
                if lane is None:
                    del lanes[work]
                else:
                    lanes[work] = lane
        for event in done.values():
            self._wait(event)

    def hold(self, *values: object) -> None:
        """Keep the memory of tensors, of records too, that came from another lane until this one is done with it.

        The device would give it to the next that asks in the lane that it came from, as soon as no one here knows it.
        """
        if self._streams is not None:
            stream = self._streams.current_stream()
            for tensor in tensors(values):
                tensor.record_stream(stream)

    @contextmanager
    def _within(self, lane: str, before: torch.Event | None) -> Iterator[None]:
        """Issue what is done inside in a lane, to run after an event."""
        if self._streams is None:
            yield
            return
        stream = self._streams.current_stream() if lane == "compute" else self._aside
        with self._streams.stream(stream):
            self._wait(before)
            yield

    def _now(self) -> torch.Event | None:
        """Return the event that all is done that was issued in the current stream so far."""
        return None if self._streams is None else self._streams.current_stream().record_event()

    def _wait(self, event: torch.Event | None) -> None:
        if self._streams is not None:
            self._streams.current_stream().wait_event(event)

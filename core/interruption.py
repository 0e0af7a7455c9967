"""Being asked to stop: the first SIGINT or SIGTERM lets the step finish, a second Ctrl-C ends the process at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tangram.core.terminal import KILLED

_SHOW_CURSOR = b"\x1b[?25h"  # a progress display hides it


class RunInterruptedError(Exception):
    """A run was asked to stop and did; the message says where it stands and how to go on."""


class Interruption:
    """Whether the run was asked to stop.

    Attributes:
        caught: Name of the signal that asked; empty while none has.
    """

    def __init__(self) -> None:
        self.caught = ""
        self._leave: Callable[[], RunInterruptedError] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals over inside. Only the main thread of a process can: elsewhere nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self, step: int) -> Iterator[None]:
        """Stop right where the run is, inside: it stands in the checkpoint of `step` already.

        Raises:
            RunInterruptedError: It was asked to stop, before or inside.
        """
        if self.caught:
            raise self.as_error(step)
        self._leave = lambda: self.as_error(step)
        try:
            yield
        finally:
            self._leave = None

    def as_error(self, step: int) -> RunInterruptedError:
        """Return what ends the run after `step` was saved."""
        return RunInterruptedError(f"stopped by {self.caught} after step {step}, now saved; --resume goes on")

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            if number == signal.SIGINT:
                if sys.stdout.isatty():
                    os.write(1, _SHOW_CURSOR)
                os._exit(KILLED)
            return
        self.caught = signal.Signals(number).name
        if self._leave is not None:
            raise self._leave()
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{self.caught}: finishing the step and saving; Ctrl-C ends at once\n".encode())

"""Where workers work: a thread of this process, or a process of its own, each at the other end of a socket."""

import asyncio
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from subprocess import DEVNULL, Popen

from attrs import define, field, frozen

from tangram.core.model import Model
from tangram.plugins.serving.wire import Head, Line, frame
from tangram.plugins.serving.worker import work


@define(eq=False)
class Hand:
    """A worker as the front sees it.

    Attributes:
        seat: Where it works.
        reader: What it says.
        process: Its process; none where it is a thread.
        numbers: The texts that it has.
        cache_bytes: Bytes that its caches hold.
        rounds: Forwards of the trunk for a text that it has counted.
        offered: Drafts whose predecessors were kept, by depth.
        accepted: Drafts that were kept, by depth.
        heard: When it last said something.
    """

    seat: "Seat"
    reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    process: Popen[bytes] | None = None
    numbers: set[int] = field(factory=set)
    cache_bytes: int = 0
    rounds: int = 0
    offered: list[int] = field(factory=list)
    accepted: list[int] = field(factory=list)
    heard: float = field(factory=time.monotonic)

    @property
    def free(self) -> int:
        """Texts that it could have beside those it has."""
        return self.seat.places - len(self.numbers)

    def send(self, head: Head, body: bytes = b"") -> None:
        """Tell it something; if it is gone, that is soon noticed by who listens to it."""
        if not self._writer.is_closing():
            self._writer.write(frame(head, body))

    def kill(self) -> None:
        """End its process, if it has one of its own."""
        if self.process is not None:
            self.process.kill()

    async def leave(self) -> None:
        """Send it home."""
        self._writer.close()
        self.kill()
        if self.process is not None:
            await asyncio.to_thread(self.process.wait)


@frozen(eq=False)
class Seat(ABC):
    """A place for one worker after another.

    Attributes:
        reads: Its workers only read prompts.
        places: Texts that a worker has at once.
        settings: What a worker is told before anything else.
    """

    reads: bool
    places: int
    settings: Head

    @abstractmethod
    async def fill(self) -> Hand:
        """Start a worker."""

    async def _seen(self, end: socket.socket, process: Popen[bytes] | None = None) -> Hand:
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return Hand(self, reader, writer, process)


@frozen(eq=False)
class ThreadSeat(Seat):
    """A thread of this process.

    Attributes:
        model: What its workers continue texts with.
    """

    model: Model

    async def fill(self) -> Hand:
        """Start a worker."""
        mine, theirs = socket.socketpair()
        settings = self.settings | {"reads": self.reads}
        threading.Thread(target=work, args=(Line(theirs), self.model, settings), name="worker", daemon=True).start()
        return await self._seen(mine)


@frozen(eq=False)
class ProcessSeat(Seat):
    """A process, which loads the model for itself."""

    async def fill(self) -> Hand:
        """Start a worker."""
        mine, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tangram.plugins.serving.worker", str(theirs.fileno())]
            process = Popen(command, stdin=DEVNULL, pass_fds=[theirs.fileno()])
        hand = await self._seen(mine, process)
        hand.send(self.settings | {"reads": self.reads})
        return hand

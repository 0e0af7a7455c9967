"""A worker: one thread or process that owns a decoder and continues sequences for the front.

What it is told: `start` (a prompt to read and, unless it only reads, to continue), `take` (a sequence that another
worker has read), `drop`. What it says: `ready`; `made`, after every round, each sequence's next tokens; `packet`, a
sequence that it has read, for another worker. A sequence ends by EOS or with its last token, which both sides see.
"""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from attrs import define

from tangram.core.decoding import Decoder
from tangram.core.model import Model
from tangram.core.sampling import Sampling
from tangram.plugins.serving.wire import Head, Line, packed, unpacked


@define
class _Job:
    """A sequence of the front.

    Attributes:
        number: Its number there.
        left: Most tokens that it may still be given.
        ended: Whether it has all its tokens.
        wanted: Whether the front still wants them.
    """

    number: int
    left: int
    ended: bool = False
    wanted: bool = True


class Worker:
    """Continues the front's sequences together; they come and go between rounds.

    Args:
        line: The line to the front.
        decoder: What continues them.
        eos: The token that ends a document.
        reads: Only read prompts, and hand the sequences on.
    """

    def __init__(self, line: Line, decoder: Decoder, eos: int, *, reads: bool) -> None:
        self._line, self._decoder, self._eos, self._reads = line, decoder, eos, reads
        self._jobs: list[_Job] = []  # a row of the decoder each
        self._new: list[tuple[_Job, Head]] = []

    def work(self) -> None:
        """Work until the front is gone."""
        try:
            self._line.send({"what": "ready"})
            while True:
                for head, body in self._line.heard(wait=not self._jobs and not self._new):
                    self._hear(head, body)
                self._keep()
                made = self._given(self._jobs, self._decoder.step())
                new = [job for job, _ in self._new]
                first = self._admitted()
                self._jobs += new
                made += self._given(new, first)
                packets = self._released() if self._reads else []
                self._keep()
                self._tell(made)
                for head, body in packets:
                    self._line.send(head, body)
        except (EOFError, ConnectionError):
            return

    def _hear(self, head: Head, body: bytes) -> None:
        what, number = head["what"], head["number"]
        if what == "start":
            self._new.append((_Job(number, head["left"]), head))
        elif what == "take":
            self._decoder.take(unpacked(head["running"], body))
            self._jobs.append(_Job(number, head["left"]))
        else:
            for job in self._jobs:
                job.wanted = job.wanted and job.number != number
            self._new = [(job, asked) for job, asked in self._new if job.number != number]

    def _admitted(self) -> list[list[int]]:
        """Take up the sequences that are new; return the first token of each."""
        asked = [head for _, head in self._new]
        self._new = []
        if not asked:
            return []
        prompts, draws = [head["prompt"] for head in asked], [head["draws"] for head in asked]
        return self._decoder.admit(prompts, [Sampling(**head["sampling"]) for head in asked], draws)

    def _given(self, jobs: Sequence[_Job], made: Sequence[Sequence[int]]) -> list[list[object]]:
        """Count the tokens of these sequences; return what is said of them: number, tokens, draws."""
        said: list[list[object]] = []
        running = self._decoder.running[len(self._decoder.running) - len(made) :]
        for job, tokens, one in zip(jobs, made, running, strict=True):
            kept = tokens[: job.left]
            if self._eos in kept:
                kept = kept[: kept.index(self._eos) + 1]
                job.ended = True
            job.left -= len(kept)
            job.ended = job.ended or job.left == 0
            said.append([job.number, kept, one.draws])
        return said

    def _released(self) -> list[tuple[Head, bytes]]:
        """Let go of all sequences; return what is said of those that go on."""
        said = []
        for row in reversed(range(len(self._jobs))):
            job, packet = self._jobs.pop(), self._decoder.release(row)
            if not job.ended:
                running, body = packed(packet)
                said.append(({"what": "packet", "number": job.number, "left": job.left, "running": running}, body))
        return said[::-1]

    def _keep(self) -> None:
        """Let go of what has ended and of what the front no longer wants."""
        rows = [row for row, job in enumerate(self._jobs) if job.wanted and not job.ended]
        self._decoder.keep(rows)
        self._jobs = [self._jobs[row] for row in rows]

    def _tell(self, made: list[list[object]]) -> None:
        tally = self._decoder.tally
        self._line.send(
            {
                "what": "made",
                "made": made,
                "cache_bytes": self._decoder.cache_bytes,
                "offered": tally.offered,
                "accepted": tally.accepted,
                "rounds": tally.rounds,
            }
        )


def work(line: Line, model: Model, settings: Head) -> None:
    """Continue sequences with a model until the front is gone; the line is closed then, or at an error.

    Raises:
        ValueError: The model has nothing to draft with.
    """
    with line:
        decoder = Decoder(model, settings["length"], speculate=settings["speculate"])
        Worker(line, decoder, settings["eos"], reads=settings["reads"]).work()


def main() -> None:
    """Work as a process of its own: the first argument is the socket's number, the first frame says what to load."""
    import signal

    import torch

    from tangram.core.trained import load_model

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of a terminal; the front ends this one
    line = Line(socket.socket(fileno=int(sys.argv[1])))
    try:
        ((settings, _),) = line.heard(wait=True)
    except EOFError:
        return
    torch.set_num_threads(settings["threads"])
    files = [Path(file) for file in settings["plugins"]]
    work(line, load_model(Path(settings["run"]), files, averaged=settings["ema"]), settings)


if __name__ == "__main__":
    main()

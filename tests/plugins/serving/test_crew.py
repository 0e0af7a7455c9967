"""Workers that die, at any moment and in any role: every text goes on elsewhere, as if nothing had been."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import httpx
import pytest
from attrs import evolve, frozen
from clients import crowd, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from served import LENGTH, VOCABULARY, Server, alone, events, larger, model, offer, process, run

from tangram.core.continuation import Request
from tangram.core.sampling import Sampling
from tangram.plugins.serving.crew import ClosedError, Crew, LostError
from tangram.plugins.serving.metrics import Metrics
from tangram.plugins.serving.seats import Hand, Seat
from tangram.plugins.serving.wire import Head, Line
from tangram.plugins.serving.worker import work


class Mortal(Line):
    """A line that breaks at the frame after so many, in its middle."""

    def __init__(self, end: socket.socket, frames: int) -> None:
        super().__init__(end)
        self._mortal, self._left = end, frames

    def send(self, head: Head, body: bytes = b"") -> None:
        if not self._left:
            self._mortal.sendall(b"\0\0")
            raise ConnectionResetError("killed")
        self._left -= 1
        super().send(head, body)


@frozen(eq=False)
class MortalSeat(Seat):
    """A thread; the first workers of the seat die at these frames, those after them never."""

    lives: list[int]

    async def fill(self) -> Hand:
        mine, theirs = socket.socketpair()
        line = Mortal(theirs, self.lives.pop(0) if self.lives else -1)
        told = {**self.settings, "reads": self.reads}
        threading.Thread(target=work, args=(line, model(), told), daemon=True).start()
        return await self._seen(mine)


def seats(lives: Sequence[Sequence[int]], *, split: bool, speculate: bool) -> list[Seat]:
    told: Head = {"length": LENGTH, "speculate": speculate, "eos": offer().tokenizer.eos}
    return [MortalSeat(split and not i, 3, told, list(own)) for i, own in enumerate(lives)]


REQUESTS = [
    Request(
        prompt=tuple(prompt(i, 2 + 3 * i, VOCABULARY)),
        tokens=6 + i,
        sampling=Sampling(temperature=1.2 * (i % 2), repetition_penalty=1.0 + 0.2 * (i % 2), seed=i),
    )
    for i in range(5)
]


async def texts(crew: Crew, requests: Sequence[Request]) -> list[str]:
    """Return the texts that a crew makes, asked for one by one and at once."""
    await crew.start()
    try:
        said = [""] * len(requests)

        async def one(i: int) -> None:
            async for piece in crew.submit([requests[i]]).pieces():
                said[i] += piece.text

        await asyncio.gather(*map(one, range(len(requests))))
        await crew.drain()
        return said
    finally:
        await crew.stop()


@settings(max_examples=8)
@given(
    first=st.lists(st.integers(1, 8), max_size=1),  # a text is given up at the third death that it meets
    second=st.lists(st.integers(1, 8), max_size=1),
    split=st.booleans(),
    speculate=st.booleans(),
)
def test_texts_outlive_their_workers(first: list[int], second: list[int], split: bool, speculate: bool) -> None:
    # With drafts a text that is drawn goes on with other draws after a death; what is likeliest stays so.
    asked = [evolve(request, sampling=Sampling()) for request in REQUESTS] if speculate else REQUESTS
    crew = Crew(seats([first, second], split=split, speculate=speculate), offer().tokenizer, 9, Metrics())
    assert asyncio.run(texts(crew, asked)) == [alone(request)[0] for request in asked]


def test_a_text_that_no_worker_survives_is_given_up_and_the_others_go_on() -> None:
    async def both() -> tuple[str, str]:
        crew = Crew(seats([[1, 1, 1]], split=False, speculate=False), offer().tokenizer, 9, Metrics())
        await crew.start()
        with pytest.raises(LostError, match="died"):
            async for _ in crew.submit([REQUESTS[0]]).pieces():
                pass
        said = "".join([piece.text async for piece in crew.submit([REQUESTS[1]]).pieces()])
        await crew.stop()
        return said, alone(REQUESTS[1])[0]

    said, wanted = asyncio.run(both())
    assert said == wanted


def test_workers_that_never_get_ready_end_the_start_and_without_workers_no_text_waits_for_ever() -> None:
    async def each() -> None:
        crew = Crew(seats([[0, 0, 0]], split=False, speculate=False), offer().tokenizer, 9, Metrics())
        with pytest.raises(ClosedError, match="before they are ready"):
            await crew.start()
        await crew.stop()
        crew = Crew(seats([[1, 0, 0]], split=False, speculate=False), offer().tokenizer, 9, Metrics())
        await crew.start()
        order = crew.submit([REQUESTS[0]])
        with pytest.raises(LostError):
            async for _ in order.pieces():
                pass
        await crew.broken.wait()
        assert not crew.healthy
        with pytest.raises(ClosedError):
            crew.submit([REQUESTS[0]])
        await crew.drain()
        await crew.stop()

    asyncio.run(each())


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, in that order."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return sorted(map(int, file.read().split()))


def test_a_worker_in_a_process_of_its_own_makes_the_same_text() -> None:
    with Server(decode_workers=1) as server:
        choice = server.complete(list(REQUESTS[4].prompt), max_tokens=20)["choices"][0]
        assert choice["text"] == alone(evolve(REQUESTS[4], sampling=Sampling(), tokens=20))[0]
    assert server.code == 0


@pytest.mark.soak
def test_processes_hand_the_cache_over_and_outlive_a_kill() -> None:
    wanted = {"prompt": list(REQUESTS[4].prompt), "temperature": 0, "max_tokens": 40}
    whole = alone(evolve(REQUESTS[4], sampling=Sampling(), tokens=40))[0]
    with process("--prefill-workers", "1", "--decode-workers", "1", "--speculate") as (served, url):
        client = httpx.Client(base_url=url, timeout=120)
        with client.stream("POST", "/v1/completions", json={**wanted, "stream": True}) as answer:
            pieces = events(answer)
            said = next(pieces)["choices"][0]["text"]
            os.kill(children(served.pid)[-1], signal.SIGKILL)
            said += "".join(event["choices"][0]["text"] for event in pieces)
        assert said == whole
        assert client.post("/v1/completions", json=wanted).json()["choices"][0]["text"] == whole
        assert "tangram_worker_deaths_total 1.0" in client.get("/metrics").text
        client.close()
        served.send_signal(signal.SIGTERM)
        assert served.wait() == 0


@pytest.mark.soak
@pytest.mark.parametrize("of", [run, larger], ids=["small", "v3-tiny"])
@pytest.mark.parametrize("workers", [(0, 1), (0, 2), (1, 1)], ids=["one", "two", "split"])
def test_a_thousand_requests_of_64_clients_outlive_a_kill(workers: tuple[int, int], of: Callable[[], Path]) -> None:
    asked = lambda i: {"prompt": prompt(i, 32, VOCABULARY), "max_tokens": 16, "temperature": 0}  # noqa: E731
    flags = ("--prefill-workers", str(workers[0]), "--decode-workers", str(workers[1]))
    with process(*flags, of=of()) as (served, url):
        begun = time.perf_counter()
        kill = partial(os.kill, children(served.pid)[-1], signal.SIGKILL)
        found = asyncio.run(crowd(url, clients=64, requests=1000, body=asked, midway=kill))
        seconds = time.perf_counter() - begun
        assert found.statuses[200] == 1000 and set(found.statuses) <= {200, 429}
        assert not found.wrong
        assert "tangram_worker_deaths_total 1.0" in httpx.get(f"{url}/metrics").text
        served.send_signal(signal.SIGTERM)
        assert served.wait() == 0
    times = sorted(found.seconds)
    print(
        f"{seconds:.1f} s, {sum(found.tokens) / seconds:.0f} tokens/s, p50 {times[500]:.2f} s, p99 {times[990]:.2f} s"
    )

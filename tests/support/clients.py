"""Many clients of a server at once, each with one request after another."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from random import Random

import httpx
from attrs import field, frozen

WORDS = ["naïve", "café", "世界", "ends", "🙂", "0123456789"]


@frozen
class Found:
    """What clients met: answers by status, the seconds of those with a text, and texts that are not as asked for."""

    statuses: Counter[int] = field(factory=Counter)
    seconds: list[float] = field(factory=list)
    wrong: list[str] = field(factory=list)
    tokens: list[int] = field(factory=list)


def prompt(number: int, tokens: int, vocabulary: int) -> list[int]:
    """Return the prompt of a request."""
    stream = Random(number)
    return [0, *(stream.randrange(9, vocabulary) for _ in range(tokens - 1))]


async def crowd(
    url: str, *, clients: int, requests: int, body: Callable[[int], dict], midway: Callable[[], object]
) -> Found:
    """Send requests, each again after a refusal for want of room; call `midway` when half of them are answered."""
    found, numbers, called = Found(), iter(range(requests)), []

    async def one(client: httpx.AsyncClient) -> None:
        for number in numbers:
            begun, asked = time.perf_counter(), body(number)
            while True:
                answer = await client.post("/v1/completions", json=asked)
                found.statuses[answer.status_code] += 1
                if answer.status_code != 429:
                    break
                await asyncio.sleep(float(answer.headers["Retry-After"]) / 10)
            if answer.status_code == 200:
                tree = answer.json()
                found.seconds.append(time.perf_counter() - begun)
                found.tokens.append(tree["usage"]["completion_tokens"])
                choice = tree["choices"][0]
                if choice["finish_reason"] == "length" and found.tokens[-1] != asked["max_tokens"]:
                    found.wrong.append(answer.text)
            if not called and len(found.seconds) * 2 >= requests:
                called.append(midway())

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return found

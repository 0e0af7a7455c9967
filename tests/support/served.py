"""A small run with a tokenizer, and a server of it in this process or in one of its own."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import httpx
import torch
from corpus import folder
from released import fill
from tiny import on_text

from tangram.core import build_model, checkpoint, load_preset
from tangram.core.continuation import Continuation, Request
from tangram.core.decoding import Decoder
from tangram.core.experiment import Experiment
from tangram.core.model import Model
from tangram.core.presets import to_yaml
from tangram.core.trained import Offer, load_model, load_offer
from tangram.plugins.data.bpe import EOS
from tangram.plugins.serving.command import Settings, bound, serving

VOCABULARY, LENGTH = 280, 64


@cache
def run() -> Path:
    """Return the directory of a small run whose greedy texts do not repeat themselves at once."""
    experiment = on_text("name=small", f"model.vocab_size={VOCABULARY}", f"train.sequence_length={LENGTH}")
    return _saved(experiment, folder() / "served")


@cache
def larger() -> Path:
    """Return the directory of a run of v3-tiny, whose tokenizer knows the standard library."""
    return _saved(load_preset("v3-tiny"), folder() / "served-larger")


def _saved(experiment: Experiment, directory: Path) -> Path:
    model = fill(build_model(experiment))
    with torch.no_grad():
        model.state_dict()["head.weight"][EOS] = 0.0  # never the likeliest: a greedy text is as long as it may be
    checkpoint.save(directory / "checkpoints", 7, {"model": model.state_dict()}, {})
    (directory / "experiment.yaml").write_text(to_yaml(experiment), encoding="utf-8")
    return directory


@cache
def model() -> Model:
    """Return its model."""
    return load_model(run(), ())


@cache
def offer() -> Offer:
    """Return what it has to offer."""
    return load_offer(run(), (), speculate=True)


def alone(request: Request) -> tuple[str, str | None, int]:
    """Return the text of a request that has a decoder for itself, why it ended, and its tokens."""
    decoder, text = Decoder(model(), len(request.prompt) + request.tokens + 1), Continuation(request, offer().tokenizer)
    said = text.take(decoder.admit([request.prompt], [request.sampling])[0])
    while text.reason is None:
        said += text.take(decoder.step()[0])
    return said, text.reason, len(text.made)


class Server:
    """A server in a thread of this process, and a client of it."""

    def __init__(self, **settings: object) -> None:
        self._settings = Settings(run=run(), port=0, **settings)
        self._ready, self.code = threading.Event(), -1
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
        with bound("127.0.0.1", 0) as listening:
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            try:
                self.code = await serving(self._settings, offer(), listening, self._ready.set, self.stopping)
            finally:
                self._ready.set()

    def stop(self) -> None:
        """Tell it to finish."""
        self.loop.call_soon_threadsafe(self.stopping.set)

    def __enter__(self) -> "Server":
        self._thread.start()
        self._ready.wait()
        assert self.code < 0
        self.client = httpx.Client(base_url=self.url, timeout=120)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.stop()
        self._thread.join()

    def ask(self, prompt: object, patience: float = 120, **fields: object) -> httpx.Response:
        """Return what becomes of a request for greedy completions; wait so many seconds for it."""
        body = {"prompt": prompt, "temperature": 0, **fields}
        return self.client.post("/v1/completions", json=body, timeout=httpx.Timeout(120, read=patience))

    def complete(self, prompt: object, **fields: object) -> dict:
        """Return the answer to a request for greedy completions."""
        answer = self.ask(prompt, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @contextmanager
    def stream(self, prompt: object, path: str = "completions", **fields: object) -> Iterator[Iterator[dict]]:
        """Give the events of a stream as they come, up to its end."""
        body = {"prompt": prompt, "temperature": 0, "stream": True, **fields}
        with self.client.stream("POST", f"/v1/{path}", json=body) as answer:
            assert answer.status_code == 200
            yield events(answer)

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name and labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def events(answer: httpx.Response) -> Iterator[dict]:
    """Yield the events of an answer; it ends with [DONE]."""
    for line in answer.iter_lines():
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("a stream ends with [DONE]")


@contextmanager
def process(*flags: str, of: Path | None = None) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start `tangram serve` of a run, the small one by default, as a user does; give the process and its address."""
    command = [sys.executable, "-m", "tangram.core.cli", "serve", str(of or run()), "--port", "0", *flags]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = started.stdout.readline()
        yield started, line.split()[-1]
    finally:
        started.kill()
        started.wait()
        started.stdout.close()

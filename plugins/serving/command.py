"""The command `serve`: binds, starts the workers, and serves until it is told to stop."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from attrs import evolve, frozen

from tangram.core.terminal import FAILED, OK, refuse, say
from tangram.core.trained import Offer, as_run, load_model, load_offer
from tangram.plugins.serving.api import Service
from tangram.plugins.serving.crew import ClosedError, Crew
from tangram.plugins.serving.metrics import Metrics
from tangram.plugins.serving.seats import ProcessSeat, Seat, ThreadSeat

_FAREWELL = 5
"""Seconds in which connections have to end after the last text."""


@frozen(kw_only=True)
class Settings:
    """How a run is served.

    Attributes:
        run: The run directory, or a folder of weights in the format of DeepSeek-V3's release.
        ema: Whether the averaged weights are taken.
        plugins: Plugin files to load.
        host: The address to bind.
        port: The port; 0 for any that is free.
        batch: Texts that a worker continues at once.
        queue: Texts that may wait beyond those.
        context: Most tokens of a prompt and its continuation; none for what the model was trained on.
        body: Most bytes of a request.
        seconds: Most seconds that a request may take.
        speculate: Draft with the model's MTP modules.
        prefill_workers: Processes that read prompts.
        decode_workers: Processes that continue them, or do both where none only reads; 0 for a thread.
    """

    run: Path
    ema: bool = False
    plugins: tuple[Path, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    batch: int = 16
    queue: int = 256
    context: int | None = None
    body: int = 1 << 20
    seconds: float = 120.0
    speculate: bool = False
    prefill_workers: int = 0
    decode_workers: int = 0


def serve(settings: Settings) -> int:
    """Serve a run until SIGTERM or Ctrl-C; return the exit code.

    Raises:
        RunError: The run cannot be served.
        CheckpointError: No checkpoint is whole.
    """
    if settings.prefill_workers and not settings.decode_workers:
        return refuse("--prefill-workers read for --decode-workers; say how many of these there are to be")
    try:
        listening = bound(settings.host, settings.port)
    except OSError as error:
        return refuse(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}")
    with listening, as_run(settings.run, settings.plugins) as run:
        offer = load_offer(run, settings.plugins, speculate=settings.speculate)
        return asyncio.run(_until_told(evolve(settings, run=run), offer, listening))


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        OSError: The address is not ours, or the port is taken.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.socket(family, kind)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    return listening


async def _until_told(settings: Settings, offer: Offer, listening: socket.socket) -> int:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def ready() -> None:
        host, port = listening.getsockname()[:2]
        say(f"serving {offer.name} on http://{f'[{host}]' if ':' in host else host}:{port}")

    def told() -> None:
        if stop.is_set():
            at_work.cancel()
        stop.set()

    at_work = asyncio.create_task(serving(settings, offer, listening, ready, stop))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    try:
        return await at_work
    except asyncio.CancelledError:  # told twice
        return FAILED


async def serving(
    settings: Settings, offer: Offer, listening: socket.socket, ready: Callable[[], None], stop: asyncio.Event
) -> int:
    """Serve on a socket; return the exit code.

    Args:
        settings: How.
        offer: What.
        listening: The socket.
        ready: Called when all workers are there.
        stop: Ends it: no more texts are taken, those under way are finished.
    """
    from uvicorn import Config, Server

    metrics, context = Metrics(), settings.context or offer.length
    crew = Crew(_seats(settings, offer, context), offer.tokenizer, settings.queue, metrics)
    told = asyncio.create_task(stop.wait())
    try:
        starting = asyncio.create_task(crew.start())
        await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return OK
        await starting
        service = Service(offer, crew, metrics, context=context, body=settings.body, seconds=settings.seconds)
        config = Config(
            service.app(),
            lifespan="off",
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_FAREWELL,
        )
        server = Server(config)
        server.capture_signals = nullcontext  # type: ignore[method-assign, assignment]  # whoever runs this handles them
        answering = asyncio.create_task(server.serve([listening]))
        broken = asyncio.create_task(crew.broken.wait())
        ready()
        await asyncio.wait({told, broken, answering}, return_when=asyncio.FIRST_COMPLETED)
        await crew.drain()
        server.should_exit = True
        await answering
        if crew.broken.is_set():
            say("the workers die before they are ready; what they said stands above")
            return FAILED
        return OK
    except ClosedError as error:
        say(str(error))
        return FAILED
    finally:
        told.cancel()
        await crew.stop()


def _seats(settings: Settings, offer: Offer, context: int) -> Sequence[Seat]:
    processes = settings.prefill_workers + settings.decode_workers
    told = {
        "run": str(settings.run),
        "ema": settings.ema,
        "plugins": [str(file) for file in settings.plugins],
        "length": context,
        "speculate": settings.speculate,
        "eos": offer.tokenizer.eos,
        "threads": max(1, (os.cpu_count() or 1) // max(1, processes)),
    }
    if not processes:
        return [
            ThreadSeat(False, settings.batch, told, load_model(settings.run, settings.plugins, averaged=settings.ema))
        ]
    reading = [ProcessSeat(True, settings.batch, told) for _ in range(settings.prefill_workers)]
    return [*reading, *(ProcessSeat(False, settings.batch, told) for _ in range(settings.decode_workers))]

"""The endpoints: OpenAI's completions and chats, the models, health and metrics."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from secrets import token_hex
from typing import TYPE_CHECKING, TypeAlias

from tangram.core.continuation import Reason
from tangram.core.trained import Offer
from tangram.plugins.serving.asking import Asked, Limits, RefusedError, read_chat, read_completion
from tangram.plugins.serving.crew import ClosedError, Crew, FullError, LostError, Order
from tangram.plugins.serving.metrics import Metrics
from tangram.plugins.serving.shapes import CHAT, COMPLETION, Shape, Tree, answer, error, event, usage

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_GRACE = 5.0
"""Seconds in which a client may take in the error that tells it that its time is over."""

_Reading: TypeAlias = Callable[[bytes, Offer, Limits], Asked]


class Service:
    """What the endpoints do.

    Args:
        offer: What is served.
        crew: Who continues texts.
        metrics: Where to count.
        context: Most tokens of a prompt and its continuation.
        body: Most bytes of a request.
        seconds: Most seconds that a request may take.
    """

    def __init__(self, offer: Offer, crew: Crew, metrics: Metrics, *, context: int, body: int, seconds: float) -> None:
        self._offer, self._crew, self._metrics = offer, crew, metrics
        self._limits, self._body, self._seconds = Limits(context, crew.most), body, seconds
        self._since = int(time.time())

    def app(self) -> "ASGIApp":
        """Return the application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        routes = [
            Route("/v1/completions", self._endpoint(read_completion, COMPLETION), methods=["POST"]),
            Route("/v1/chat/completions", self._endpoint(read_chat, CHAT), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
            Route("/metrics", self._tell_metrics),
        ]
        app = Starlette(routes=routes)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _fault)
        return _Counted(app, self._metrics)

    def _endpoint(self, read: _Reading, shape: Shape) -> "Callable[[Request], Awaitable[Response | _Continuing]]":
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import ClientDisconnect

        async def endpoint(request: "Request") -> "Response | _Continuing":
            try:
                deadline = asyncio.get_running_loop().time() + self._seconds
                async with asyncio.timeout_at(deadline):
                    body = await self._read_body(request)
                asked = await run_in_threadpool(read, body, self._offer, self._limits)
                order = self._crew.submit(asked.texts)
            except RefusedError as refused:
                return answer(error(refused.message, refused.status, refused.param), refused.status)
            except FullError as full:
                return answer(error(str(full), 429), 429, {"Retry-After": "1"})
            except ClosedError as closed:
                return answer(error(str(closed), 503), 503)
            except TimeoutError:
                return answer(error("the request took too long to arrive", 408), 408)
            except ClientDisconnect:
                return answer(error("the client went away", 400), 400)  # which no one reads
            told = {"id": shape.prefix + token_hex(12), "created": int(time.time()), "model": self._offer.name}
            return _Continuing(self._crew, order, asked, shape, told, deadline, self._metrics)

        return endpoint

    async def _read_body(self, request: "Request") -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page of another origin may send other types without asking first.
            raise RefusedError("the content type of a request is application/json", status=415)
        body = bytearray()
        async for more in request.stream():
            body += more
            if len(body) > self._body:
                raise RefusedError(f"a request has at most {self._body} bytes", status=413)
        return bytes(body)

    async def _models(self, _request: "Request") -> "Response":
        entry = {"id": self._offer.name, "object": "model", "created": self._since, "owned_by": "tangram"}
        return answer({"object": "list", "data": [entry]})

    async def _health(self, _request: "Request") -> "Response":
        healthy = self._crew.healthy
        return answer({"status": "ok" if healthy else "unavailable"}, 200 if healthy else 503)

    async def _tell_metrics(self, _request: "Request") -> "Response":
        from starlette.responses import Response

        self._crew.measure()
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Continuing:
    """The answer to a request whose texts are under way: at once when they are over, or piece by piece.

    Whoever goes away meanwhile has nothing more made for him.
    """

    def __init__(
        self, crew: Crew, order: Order, asked: Asked, shape: Shape, told: Tree, deadline: float, metrics: Metrics
    ) -> None:
        self._crew, self._order, self._asked, self._shape = crew, order, asked, shape
        self._told, self._deadline, self._metrics = told, deadline, metrics

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer."""
        answering = asyncio.ensure_future(
            self._stream(send) if self._asked.stream else self._whole(scope, receive, send)
        )
        gone = asyncio.ensure_future(_gone(receive))
        left = self._deadline + _GRACE - asyncio.get_running_loop().time()
        try:
            await asyncio.wait({answering, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, gone):
                task.cancel()
            self._metrics.cancelled.inc(self._crew.cancel(self._order))
        if answering.done():
            answering.result()

    async def _pieces(self, each: Callable[[int, str, Reason | None], Awaitable[None]]) -> tuple[str, int] | None:
        """Await `each` for all pieces; return what ended them early, if something did, and its HTTP status."""
        try:
            async with asyncio.timeout_at(self._deadline):
                async for index, text, reason, _ in self._order.pieces():
                    await each(index, text, reason)
        except TimeoutError:
            self._crew.cancel(self._order, late=True)
            return f"the {len(self._order.texts)} texts took more time than a request may", 504
        except LostError as lost:
            return str(lost), 503
        return None

    def _usage(self) -> Tree:
        return usage(self._asked.prompt_tokens, [len(text.made) for text in self._order.texts])

    async def _whole(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        said = list(self._asked.begins)

        async def add(index: int, text: str, _reason: Reason | None) -> None:
            said[index] += text

        failed = await self._pieces(add)
        if failed is not None:
            await answer(error(*failed), failed[1])(scope, receive, send)
            return
        choices = [
            self._shape.choice(i, text, one.reason)
            for i, (text, one) in enumerate(zip(said, self._order.texts, strict=True))
        ]
        tree = {**self._told, "object": self._shape.whole, "choices": choices, "usage": self._usage()}
        await answer(tree)(scope, receive, send)

    async def _stream(self, send: "Send") -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def tell(data: Tree | str) -> None:
            await send({"type": "http.response.body", "body": event(data), "more_body": True})

        async def chunk(*choices: Tree, counts: Tree | None = None) -> None:
            counted = {"usage": counts} if self._asked.usage else {}
            await tell({**self._told, "object": self._shape.piece, "choices": choices, **counted})

        async def change(index: int, text: str, reason: Reason | None) -> None:
            await chunk(self._shape.change(index, text, reason))

        for index, begin in enumerate(self._asked.begins):
            if self._shape.opening is not None:
                await chunk({**self._shape.change(index, "", None), "delta": self._shape.opening})
            if begin:
                await change(index, begin, None)
        failed = await self._pieces(change)
        if failed is not None:
            await tell(error(*failed))
        elif self._asked.usage:
            await chunk(counts=self._usage())
        await tell("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: "Receive") -> None:
    """Wait until the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Counted:
    """An application whose answers are counted, and requests for texts timed."""

    def __init__(self, app: "ASGIApp", metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        begun = time.monotonic()

        async def counted(message: "Message") -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
        if scope["type"] == "http" and scope["method"] == "POST":
            self._metrics.request.observe(time.monotonic() - begun)


async def _http_error(_request: "Request", raised: Exception) -> "Response":
    from starlette.exceptions import HTTPException

    assert isinstance(raised, HTTPException)
    return answer(error(raised.detail, raised.status_code), raised.status_code, raised.headers)


async def _fault(_request: "Request", _raised: Exception) -> "Response":
    return answer(error("the server has a fault; its log has more", 500), 500)

"""The front's side of the work: which text waits, which worker has it, and what becomes of it when a worker dies.

A text is never lost. It waits in a bounded queue, goes to a worker (or to one that reads its prompt, and then with its
cache to one that continues it), and comes back to the head of the queue when that worker dies: another one reads the
prompt and what was made already, and goes on from there.
"""

import asyncio
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence

from attrs import asdict, define, field

from tangram.core.continuation import Continuation, Piece, Request
from tangram.core.contracts import Tokenizer
from tangram.plugins.serving.metrics import Metrics
from tangram.plugins.serving.seats import Hand, Seat
from tangram.plugins.serving.wire import Head, read_frame

_TRIES = 3
"""Workers that a text may see die before it is given up, and deaths in a row after which a seat stays empty."""


class FullError(Exception):
    """The queue is full."""


class ClosedError(Exception):
    """The server takes no more texts: it is going down, or has no workers left."""


class LostError(Exception):
    """A text was given up: the workers that had it died."""


@define(eq=False)
class Order:
    """Texts that were asked for together.

    Attributes:
        texts: What each has been given so far.
    """

    texts: list[Continuation]
    _pieces: "asyncio.Queue[Piece | LostError]" = field(factory=asyncio.Queue, init=False)

    def put(self, piece: Piece | LostError) -> None:
        """Add what is new."""
        self._pieces.put_nowait(piece)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield pieces until all texts are over.

        Raises:
            LostError: One was given up.
        """
        going = len(self.texts)
        while going:
            piece = await self._pieces.get()
            if isinstance(piece, LostError):
                raise piece
            going -= piece.reason is not None
            yield piece


@define(eq=False)
class _Ticket:
    """A text on its way.

    Attributes:
        number: Its number; smaller ones came earlier.
        index: Its place in the order.
        order: The order.
        text: What it has been given.
        arrived: When it came.
        draws: Random numbers drawn for it.
        deaths: Workers that died while they had it.
        hand: The worker that has it.
    """

    number: int
    index: int
    order: Order
    text: Continuation
    arrived: float
    draws: int = 0
    deaths: int = 0
    hand: Hand | None = None


class Crew:
    """Workers, and the texts that they continue.

    Args:
        seats: Where workers work; each is filled again when its worker dies.
        tokenizer: What tokens say.
        queue: Texts that may wait beyond those that workers have.
        metrics: Where to count.

    Attributes:
        broken: Set when no worker is left that could ever go on.
    """

    def __init__(self, seats: Sequence[Seat], tokenizer: Tokenizer, queue: int, metrics: Metrics) -> None:
        self._seats, self._tokenizer, self._metrics = seats, tokenizer, metrics
        self._split = any(seat.reads for seat in seats)
        self.most = queue + sum(seat.places for seat in seats if not seat.reads)
        self.broken = asyncio.Event()
        self._tickets: dict[int, _Ticket] = {}
        self._waiting: deque[_Ticket] = deque()
        self._handed: deque[tuple[_Ticket, Head, bytes]] = deque()  # read, and without a worker that continues them
        self._hands: list[Hand] = []  # those that are ready
        self._count, self._closed = 0, False
        self._empty, self._ready = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self._keepers: list[asyncio.Task[None]] = []

    # --- for clients ------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> Order:
        """Take up texts, all or none.

        Raises:
            ClosedError: No more are taken.
            FullError: The queue is full.
        """
        if self._closed or self.broken.is_set():
            raise ClosedError("the server is going down")
        if len(self._tickets) + len(requests) > self.most:
            raise FullError(f"{len(self._tickets)} texts are under way, of at most {self.most}; try again")
        order, now = Order([Continuation(request, self._tokenizer) for request in requests]), time.monotonic()
        for index, text in enumerate(order.texts):
            self._count += 1
            ticket = _Ticket(self._count, index, order, text, now)
            self._tickets[ticket.number] = ticket
            self._waiting.append(ticket)
        self._empty.clear()
        self._pump()
        return order

    def cancel(self, order: Order, *, late: bool = False) -> int:
        """Let go of what is left of an order; return how many texts that were.

        Args:
            order: The order.
            late: It had all the time it may have. A worker that has said nothing since it came is ended.
        """
        left = [ticket for ticket in self._tickets.values() if ticket.order is order]
        for ticket in left:
            if late and ticket.hand is not None and ticket.hand.heard < ticket.arrived:
                ticket.hand.kill()
            self._end(ticket, tell=True)
        self._pump()
        return len(left)

    @property
    def healthy(self) -> bool:
        """Whether texts are taken, and there are workers that can continue them."""
        roles = {hand.seat.reads for hand in self._hands}
        return not self._closed and False in roles and (True in roles or not self._split)

    def measure(self) -> None:
        """Bring the metrics that are no counts up to date."""
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.running.set(len(self._tickets) - len(self._waiting))
        self._metrics.workers.set(len(self._hands))
        self._metrics.cache_bytes.set(sum(hand.cache_bytes for hand in self._hands))

    # --- for who runs it --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Fill all seats.

        Raises:
            ClosedError: The workers die before they are ready.
        """
        self._keepers = [asyncio.create_task(self._keep(seat)) for seat in self._seats]
        while len(self._hands) < len(self._seats):
            self._ready.clear()
            await self._ready.wait()
            if self.broken.is_set():
                raise ClosedError("the workers die before they are ready; what they said stands above")

    async def drain(self) -> None:
        """Take no more texts, and wait for the end of those that are under way."""
        self._closed = True
        await self._empty.wait()

    async def stop(self) -> None:
        """Send the workers home."""
        self._closed = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _keep(self, seat: Seat) -> None:
        """Keep a seat filled."""
        failures = 0
        while failures < _TRIES:
            hand = await seat.fill()
            try:
                while True:
                    head, body = await read_frame(hand.reader)
                    failures = 0
                    self._hear(hand, head, body)
            except (EOFError, ConnectionError):
                self._metrics.deaths.inc()
                failures += 1
            except Exception:  # a fault of ours is told, and no text waits for ever
                traceback.print_exc()
                failures += 1
            finally:
                self._lose(hand)
                await hand.leave()
        if not any(other.reads == seat.reads for other in self._living(seat)):
            self.broken.set()
            for ticket in list(self._tickets.values()):
                self._give_up(ticket)
        self._ready.set()

    def _living(self, seat: Seat) -> Iterable[Seat]:
        pairs = zip(self._seats, self._keepers, strict=True)
        return [other for other, keeper in pairs if other is not seat and not keeper.done()]

    # --- texts and workers ------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Give waiting texts to workers that have a place."""
        while self._handed and (hand := self._free(reads=False)):
            ticket, head, body = self._handed.popleft()
            self._give(hand, ticket, {"what": "take", "left": head["left"], "running": head["running"]}, body)
        while self._waiting and self._may_begin() and (hand := self._free(reads=self._split)):
            ticket = self._waiting.popleft()
            request, made = ticket.text.request, ticket.text.made
            self._give(
                hand,
                ticket,
                {
                    "what": "start",
                    "prompt": [*request.prompt, *made],
                    "left": request.tokens - len(made),
                    "sampling": asdict(request.sampling),
                    "draws": ticket.draws,
                },
            )
            self._metrics.prompt_tokens.inc(len(request.prompt))

    def _may_begin(self) -> bool:
        """Return whether a text that is read now will find a place to be continued."""
        places = sum(hand.free for hand in self._hands if not hand.seat.reads)
        reading = sum(len(hand.numbers) for hand in self._hands if hand.seat.reads)
        return reading + len(self._handed) < places

    def _free(self, *, reads: bool) -> Hand | None:
        free = [hand for hand in self._hands if hand.seat.reads == reads and hand.free > 0]
        return max(free, key=lambda hand: hand.free, default=None)

    def _give(self, hand: Hand, ticket: _Ticket, head: Head, body: bytes = b"") -> None:
        ticket.hand = hand
        hand.numbers.add(ticket.number)
        hand.send(head | {"number": ticket.number}, body)

    def _hear(self, hand: Hand, head: Head, body: bytes) -> None:
        hand.heard = time.monotonic()
        if head["what"] == "ready":
            self._hands.append(hand)
            self._ready.set()
        elif head["what"] == "packet":
            ticket = self._mine(hand, head["number"])
            if ticket is not None:
                hand.numbers.discard(ticket.number)
                ticket.hand = None
                self._handed.append((ticket, head, body))
        else:
            for number, tokens, draws in head["made"]:
                ticket = self._mine(hand, number)
                if ticket is not None:
                    self._made(ticket, tokens, draws)
            self._count_rounds(hand, head)
        self._pump()

    def _mine(self, hand: Hand, number: int) -> _Ticket | None:
        """Return the text of a number, if this worker still has it."""
        ticket = self._tickets.get(number)
        return ticket if ticket is not None and ticket.hand is hand else None

    def _made(self, ticket: _Ticket, tokens: Sequence[int], draws: int) -> None:
        if not ticket.text.made:
            self._metrics.first_token.observe(time.monotonic() - ticket.arrived)
        self._metrics.tokens.inc(len(tokens))
        ticket.draws = draws
        said = ticket.text.take(tokens)
        reason = ticket.text.reason
        if said or reason:
            ticket.order.put(Piece(ticket.index, said, reason, len(ticket.text.made)))
        if reason:
            self._end(ticket, tell=reason == "stop")

    def _count_rounds(self, hand: Hand, head: Head) -> None:
        hand.cache_bytes = head["cache_bytes"]
        self._metrics.rounds.inc(head["rounds"] - hand.rounds)
        before = [*hand.offered, *[0] * len(head["offered"])], [*hand.accepted, *[0] * len(head["accepted"])]
        offered, accepted = (
            [now - then for now, then in zip(head[name], values, strict=False)]
            for name, values in zip(("offered", "accepted"), before, strict=True)
        )
        self._metrics.drafted(offered, accepted)
        hand.rounds, hand.offered, hand.accepted = head["rounds"], head["offered"], head["accepted"]

    def _end(self, ticket: _Ticket, *, tell: bool) -> None:
        """Forget a text that is over; with `tell`, its worker may not know that it is."""
        del self._tickets[ticket.number]
        if ticket.hand is not None:
            ticket.hand.numbers.discard(ticket.number)
            if tell:
                ticket.hand.send({"what": "drop", "number": ticket.number})
        else:
            self._waiting = deque(one for one in self._waiting if one is not ticket)
            self._handed = deque(one for one in self._handed if one[0] is not ticket)
        if not self._tickets:
            self._empty.set()

    def _lose(self, hand: Hand) -> None:
        """Take back the texts of a worker that is gone."""
        self._hands = [other for other in self._hands if other is not hand]
        for number in sorted(hand.numbers, reverse=True):
            ticket = self._tickets[number]
            ticket.hand = None
            ticket.deaths += 1
            if ticket.deaths < _TRIES:
                self._waiting.appendleft(ticket)
            else:
                self._give_up(ticket)
        hand.numbers.clear()
        self._pump()

    def _give_up(self, ticket: _Ticket) -> None:
        ticket.order.put(LostError("the workers that had this text died"))
        self._end(ticket, tell=True)

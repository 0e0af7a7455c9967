"""Texts under way: what tokens say as they come, where a text stops, and many texts through one decoder."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from attrs import field, frozen
from attrs.validators import ge

from tangram.core.contracts import Tokenizer
from tangram.core.decoding import Decoder
from tangram.core.sampling import Sampling

Reason = Literal["stop", "length"]
"""Why a text ended: by its end of document or a stop string, or because it had all its tokens."""

_LONGEST = 4
"""Bytes of the longest character, and so the most tokens that one may take."""


@frozen(kw_only=True)
class Request:
    """A text to continue.

    Attributes:
        prompt: Its tokens, BOS among them.
        tokens: Most tokens to make.
        sampling: How they are drawn.
        stop: Strings before which the text ends.
    """

    prompt: tuple[int, ...]
    tokens: int = field(validator=ge(1))
    sampling: Sampling = field(factory=Sampling)
    stop: tuple[str, ...] = field(default=())

    @stop.validator
    def _check_stop(self, _attribute: object, value: tuple[str, ...]) -> None:
        if "" in value:
            raise ValueError("a stop string is not empty")


class Continuation:
    """What a request has been given so far.

    Attributes:
        request: The request.
        made: Tokens made, those of the end of the document not among them.
        reason: Why it ended; None while it goes on.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request, self._tokenizer = request, tokenizer
        self.made: list[int] = []
        self.reason: Reason | None = None
        self._unread: list[int] = []  # tokens of a character that is not whole yet
        self._held = ""  # text that may turn out to be the beginning of a stop string

    def take(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; return the text that is certain by now. What comes after the end is left out."""
        said = []
        for token in tokens:
            if self.reason is not None:
                break
            said.append(self._one(token))
        return "".join(said)

    def _one(self, token: int) -> str:
        if token == self._tokenizer.eos:
            return self._end("stop")
        self.made.append(token)
        self._unread.append(token)
        text = self._tokenizer.decode(self._unread)
        if text.endswith("\ufffd") and len(self._unread) < _LONGEST and len(self.made) < self.request.tokens:
            return ""
        self._unread = []
        self._held += text
        stops = [at for stop in self.request.stop if (at := self._held.find(stop)) >= 0]
        if stops:
            self._held = self._held[: min(stops)]
            return self._end("stop")
        if len(self.made) >= self.request.tokens:
            return self._end("length")
        return self._let_go(max((_overlap(self._held, stop) for stop in self.request.stop), default=0))

    def _end(self, reason: Reason) -> str:
        self.reason = reason
        if self._unread:
            self._held += self._tokenizer.decode(self._unread)
        return self._let_go(0)

    def _let_go(self, kept: int) -> str:
        """Return the text that is held but for its last `kept` characters."""
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how much of the end of a text is a beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Piece(NamedTuple):
    """Text that is new: whose it is, what it says, whether and why the text is over with it, and tokens until now."""

    number: int
    text: str
    reason: Reason | None
    tokens: int


def continue_all(
    decoder: Decoder, tokenizer: Tokenizer, requests: Sequence[Request], *, together: int = 16
) -> Iterator[Piece]:
    """Yield the continuations of requests piece by piece; as one text ends the next begins in its place.

    Args:
        decoder: What continues them; it has room for each prompt and its tokens.
        tokenizer: What its tokens say.
        requests: The texts.
        together: Most texts that are continued at once.
    """
    texts = [Continuation(request, tokenizer) for request in requests]
    waiting, going = list(range(len(texts))), list[int]()

    def told(rows: Sequence[int], made: Sequence[Sequence[int]]) -> Iterator[Piece]:
        for index, tokens in zip(rows, made, strict=True):
            text = texts[index].take(tokens)
            if text or texts[index].reason:
                yield Piece(index, text, texts[index].reason, len(texts[index].made))

    while waiting or going:
        new = waiting[: together - len(going)]
        del waiting[: len(new)]
        if going:
            yield from told(going, decoder.step())
        if new:
            asked = [requests[index] for index in new]
            first = decoder.admit([one.prompt for one in asked], [one.sampling for one in asked])
            going += new
            yield from told(new, first)
        stay = [row for row, index in enumerate(going) if texts[index].reason is None]
        decoder.keep(stay)
        going = [going[row] for row in stay]

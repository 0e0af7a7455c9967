"""Answers in OpenAI's shapes."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import frozen

from tangram.core.continuation import Reason

if TYPE_CHECKING:
    from starlette.responses import Response

Tree: TypeAlias = Mapping[str, Any]
"""A JSON object for outside."""

_KINDS = {404: "not_found_error", 429: "rate_limit_error"}


@frozen
class Shape:
    """How an endpoint answers.

    Attributes:
        prefix: Of an answer's id.
        whole: What a whole answer is called.
        piece: What a piece of a stream is called.
        choice: Makes a choice of its number, text and reason to end.
        change: Makes the piece of a choice of the same.
        opening: What a choice's stream begins with; none where that says nothing.
    """

    prefix: str
    whole: str
    piece: str
    choice: Callable[[int, str, Reason | None], Tree]
    change: Callable[[int, str, Reason | None], Tree]
    opening: Tree | None = None


def _text(index: int, text: str, reason: Reason | None) -> Tree:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _message(index: int, text: str, reason: Reason | None) -> Tree:
    message = {"role": "assistant", "content": text}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}


def _delta(index: int, text: str, reason: Reason | None) -> Tree:
    return {"index": index, "delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": reason}


COMPLETION = Shape("cmpl-", "text_completion", "text_completion", _text, _text)
CHAT = Shape(
    "chatcmpl-", "chat.completion", "chat.completion.chunk", _message, _delta, {"role": "assistant", "content": ""}
)


def usage(prompt_tokens: int, made: Sequence[int]) -> Tree:
    """Return the counts of an answer."""
    total = sum(made)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": total, "total_tokens": prompt_tokens + total}


def answer(tree: Tree, status: int = 200, headers: Mapping[str, str] | None = None) -> "Response":
    """Return an answer in JSON, in ASCII: whatever text it quotes can be sent."""
    from starlette.responses import Response

    return Response(json.dumps(tree).encode(), status, dict(headers or {}), "application/json")


def error(message: str, status: int, param: str | None = None) -> Tree:
    """Return an error in OpenAI's form."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def event(data: Tree | str) -> bytes:
    """Return a server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()

"""What clients may ask, in OpenAI's words: every field is understood or refused by its name, none is passed over."""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from attrs import evolve, frozen

from tangram.core.chat import ChatError
from tangram.core.continuation import Request
from tangram.core.sampling import Sampling
from tangram.core.trained import Offer

Tree: TypeAlias = Mapping[str, Any]
"""A JSON object from outside: its border is not typed."""

_STOPS, _STOP_LENGTH = 16, 256
_SEED = 1 << 63

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_COMMON = frozenset({"model", "max_tokens", "stop", "n", "stream", "stream_options", *_SAMPLING})
_COMPLETION = _COMMON | {"prompt", "echo"}
_CHAT = _COMMON | {"messages", "max_completion_tokens"}

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tools": ([],),
    "top_logprobs": (),
}
"""Fields of OpenAI's that are not understood, and with which values they ask for nothing."""


class RefusedError(Exception):
    """A request that is not served.

    Args:
        message: What is wrong.
        param: The field in which it is.
        status: The HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status


@frozen
class Asked:
    """What a request asks for.

    Attributes:
        texts: The texts to continue, one for each choice.
        prompt_tokens: Tokens of all prompts, each counted once.
        begins: What each choice begins with: its prompt if it is to be echoed.
        stream: Whether text is sent as it comes.
        usage: Whether a stream ends with the counts.
    """

    texts: tuple[Request, ...]
    prompt_tokens: int
    begins: tuple[str, ...]
    stream: bool
    usage: bool


@frozen
class Limits:
    """How much may be asked for.

    Attributes:
        context: Most tokens of a prompt and its continuation.
        texts: Most texts of a request.
    """

    context: int
    texts: int


def read_completion(body: bytes, offer: Offer, limits: Limits) -> Asked:
    """Return what the body of a request for completions asks for.

    Raises:
        RefusedError: It is none.
    """
    tree = _object(body, offer, _COMPLETION)
    prompts = _prompts(tree, offer)
    count, echo = _integer(tree, "n", 1, 1, limits.texts), _flag(tree, "echo")
    if len(prompts) * count > limits.texts:
        raise RefusedError(f"{len(prompts)} prompts times n are more than the {limits.texts} texts of a request", "n")
    wanted = _integer(tree, "max_tokens", 0, 1, limits.context)
    begins = [offer.tokenizer.decode(prompt) if echo else "" for prompt in prompts]
    return _asked(tree, prompts, wanted or 16, not wanted, count, begins, limits)


def read_chat(body: bytes, offer: Offer, limits: Limits) -> Asked:
    """Return what the body of a request for a chat asks for.

    Raises:
        RefusedError: It is none.
    """
    tree = _object(body, offer, _CHAT)
    if offer.chat is None:
        raise RefusedError(f"the tokenizer of {offer.name} has no tokens for a conversation; use /v1/completions")
    messages = _messages(tree)
    if tree.get("max_tokens") is not None and tree.get("max_completion_tokens") is not None:
        raise RefusedError("give max_tokens or max_completion_tokens, not both", "max_tokens")
    name = "max_tokens" if tree.get("max_tokens") is not None else "max_completion_tokens"
    wanted = _integer(tree, name, 0, 1, limits.context)
    try:
        prompt = offer.chat.prompt(messages)
    except ChatError as error:
        raise RefusedError(str(error), "messages") from None
    count = _integer(tree, "n", 1, 1, limits.texts)
    return _asked(tree, [prompt], wanted or limits.context, not wanted, count, [""], limits)


def _asked(
    tree: Tree,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    shrinks: bool,
    count: int,
    begins: Sequence[str],
    limits: Limits,
) -> Asked:
    sampling, stop, place = _sampling(tree), _stop(tree), "messages" if "messages" in tree else "prompt"
    texts: list[Request] = []
    for prompt in prompts:
        room = limits.context - len(prompt)
        if room < 1 or (tokens > room and not shrinks):
            told = "" if room < 1 else f" and {tokens} more"
            raise RefusedError(f"{place}: {len(prompt)} tokens{told} are beyond the context of {limits.context}", place)
        for _ in range(count):
            drawn = evolve(sampling, seed=sampling.seed + len(texts))
            texts.append(Request(prompt=tuple(prompt), tokens=min(tokens, room), sampling=drawn, stop=stop))
    stream = _flag(tree, "stream")
    usage = _stream_options(tree, stream)
    repeated = [begin for begin in begins for _ in range(count)]
    return Asked(tuple(texts), sum(map(len, prompts)), tuple(repeated), stream, usage)


def _object(body: bytes, offer: Offer, known: frozenset[str]) -> Tree:
    try:
        tree = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise RefusedError("the body is not a JSON object")
    for name, value in tree.items():
        if name in known or value is None:
            continue
        if name not in _NEUTRAL:
            raise RefusedError(f"there is no field {name[:64]!r} here", name[:64])
        if (type(value), value) not in [(type(neutral), neutral) for neutral in _NEUTRAL[name]]:
            raise RefusedError(f"{name} is not supported", name)
    model = tree.get("model")
    if model is not None and not isinstance(model, str):
        raise RefusedError("model is the name of a model", "model")
    if model not in (None, offer.name):
        raise RefusedError(f"there is no model {model[:64]!r}; {offer.name!r} is served", "model", 404)
    return tree


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _number(tree: Tree, name: str, default: float, least: float, most: float) -> float:
    value = tree.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RefusedError(f"{name} is a number", name)
    # Compared before it becomes a float, which large integers cannot.
    if not least <= value <= most or not math.isfinite(value):
        raise RefusedError(f"{name} is from {least:g} to {most:g}", name)
    return float(value)


def _integer(tree: Tree, name: str, default: int, least: int, most: int) -> int:
    value = tree.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise RefusedError(f"{name} is a whole number", name)
    if not least <= value <= most:
        raise RefusedError(f"{name} is from {least} to {most}", name)
    return value


def _flag(tree: Tree, name: str) -> bool:
    value = tree.get(name)
    if value is not None and not isinstance(value, bool):
        raise RefusedError(f"{name} is true or false", name)
    return bool(value)


def _sampling(tree: Tree) -> Sampling:
    temperature = _number(tree, "temperature", 1.0, 0.0, 100.0)
    if 0 < temperature < 1e-3:
        raise RefusedError("temperature is 0 or at least 0.001", "temperature")
    return Sampling(
        temperature=temperature,
        top_p=_number(tree, "top_p", 1.0, 1e-6, 1.0),
        top_k=_integer(tree, "top_k", 0, 0, _SEED),
        min_p=_number(tree, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(tree, "repetition_penalty", 1.0, 0.01, 100.0),
        seed=_integer(tree, "seed", secrets.randbelow(1 << 32), -_SEED, _SEED - 1),
    )


def _stop(tree: Tree) -> tuple[str, ...]:
    value = tree.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise RefusedError("stop is a string or a list of strings", "stop")
    if len(stops) > _STOPS or not all(0 < len(each) <= _STOP_LENGTH for each in stops):
        raise RefusedError(f"stop is at most {_STOPS} strings of 1 to {_STOP_LENGTH} characters", "stop")
    return tuple(stops)


def _stream_options(tree: Tree, stream: bool) -> bool:
    options = tree.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise RefusedError("stream_options is an object that may have include_usage", "stream_options")
    if not stream:
        raise RefusedError("stream_options are for a stream", "stream_options")
    return _flag(options, "include_usage")


def _prompts(tree: Tree, offer: Offer) -> list[list[int]]:
    value = tree.get("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and _numbers(value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RefusedError("prompt is a text, a list of token ids, or a list of such, and not empty", "prompt")
    return [_prompt(each, offer) for each in value]


def _numbers(value: Sequence[object]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _prompt(value: object, offer: Offer) -> list[int]:
    if isinstance(value, str) and value:
        return [offer.tokenizer.bos, *offer.tokenizer.encode(_text(value, "prompt"))]
    if isinstance(value, list) and value and _numbers(value):
        if not all(0 <= each < offer.vocab_size for each in value):
            raise RefusedError(f"the tokens of {offer.name} are 0 to {offer.vocab_size - 1}", "prompt")
        return value
    raise RefusedError("a prompt is a text or a list of token ids, and not empty", "prompt")


def _text(value: str, name: str) -> str:
    """Return the text, if it is one: JSON may have halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RefusedError(f"{name} has half a surrogate pair, which is no character", name) from None
    return value


def _messages(tree: Tree) -> list[dict[str, str]]:
    messages = tree.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages is a list of messages, and not empty", "messages")
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: object, place: str) -> dict[str, str]:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise RefusedError(f"{place} is an object with role and content, and nothing else", place)
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise RefusedError(f"{place}.role is system, user or assistant", f"{place}.role")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and set(part) == {"type", "text"}]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise RefusedError(f"{place}.content has parts that are no text", f"{place}.content")
        content = "".join(texts)
    if not isinstance(content, str):
        raise RefusedError(f"{place}.content is a text", f"{place}.content")
    return {"role": role, "content": _text(content, f"{place}.content")}

"""Conversations as prompts: a chat template, in which only the template's own special tokens are tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tangram.core.contracts import Tokenizer
from tangram.core.session import RunError
from tangram.core.tokenizer_files import CONFIG, chat_template, special_tokens


class ChatError(Exception):
    """A template is none, or refuses a conversation; the message says why."""


class Chat:
    """Makes prompts of conversations.

    The name of a special token inside a message is text like any other: who writes a message cannot end it, or speak
    as another.

    Args:
        template: The template, as tokenizer_config.json has it.
        tokenizer: The tokenizer.

    Raises:
        ChatError: The template is none.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._tokenizer, names = tokenizer, special_tokens(tokenizer)
        self._ids = {name: number for number, name in names.items() if len(name) > 1}
        self._names = re.compile("(" + "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) + ")")
        self._ends = {"bos_token": names[tokenizer.bos], "eos_token": names[tokenizer.eos]}
        # As transformers reads templates.
        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        world.globals["raise_exception"] = _refuse
        try:
            self._template = world.from_string(template)
        except TemplateError as error:
            raise ChatError(f"the chat template cannot be read: {error}") from None

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the prompt of a conversation that the model is to go on with.

        Raises:
            ChatError: The template refuses it.
        """
        mark = _unused("".join(text for message in messages for text in message.values()))
        safe = [{key: self._broken(text, mark) for key, text in message.items()} for message in messages]
        try:
            text = self._template.render(messages=safe, add_generation_prompt=True, **self._ends)
        except Exception as error:  # a template is someone's code
            raise ChatError(f"the chat template refuses the messages: {error}") from error
        ids: list[int] = []
        for part in self._names.split(text):
            if part in self._ids:
                ids.append(self._ids[part])
            elif part:
                ids += self._tokenizer.encode(part.replace(mark, ""))
        return ids

    def _broken(self, text: str, mark: str) -> str:
        """Return a text with which no name of a special token is whole, not even with what comes after it."""
        while self._names.search(text):
            text = self._names.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        begun = any(text.endswith(name[:n]) for name in self._ids for n in range(1, len(name)))
        return text + mark if begun else text


def _refuse(message: str) -> None:
    raise ChatError(message)


def _unused(text: str) -> str:
    """Return a private character that the text does not have."""
    there = set(text)
    for number in range(0xE000, 0xF900):
        if chr(number) not in there:
            return chr(number)
    raise ChatError("the messages have all private characters of Unicode")


def chat_of(run: Path, tokenizer: Tokenizer) -> Chat | None:
    """Return what makes prompts of conversations: by the template beside the tokenizer, or DeepSeek-V3's.

    Raises:
        RunError: There is a template, and it cannot be read.
    """
    file = run / CONFIG
    template = chat_template(tokenizer)
    try:
        if file.exists():
            own = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
            template = own if isinstance(own, str) else template
        return None if template is None else Chat(template, tokenizer)
    except (ValueError, AttributeError, ChatError) as error:
        raise RunError(f"{file}: {error}") from None

"""The files of a tokenizer as other tools read them, and what tells two tokenizers apart."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from tangram.core import checkpoint
from tangram.core.context import BuildError, built
from tangram.core.contracts import Tokenizer, TokenizerReader
from tangram.core.experiment import Experiment

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"

_PAD, _USER, _ASSISTANT = "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>"

_CHAT = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<USER>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<ASSISTANT>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('a message is of system, user or assistant, not of ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<ASSISTANT>' }}{% endif %}"
).replace("<USER>", _USER).replace("<ASSISTANT>", _ASSISTANT)  # fmt: skip
"""A conversation as DeepSeek-V3 has it: no line breaks, and the end of a text after every answer."""


def tokenizer_digest(tokenizer: Tokenizer | None) -> str | None:
    """Return what tells two tokenizers apart; None of tokens that stand for no text."""
    return None if tokenizer is None else sha256(tokenizer.to_json().encode()).hexdigest()


def tokenizer_of(run: Path, experiment: Experiment, folder: Path) -> Tokenizer | None:
    """Return the tokenizer that a run was trained with: the one it keeps, or else that of its text.

    Args:
        run: The run directory.
        experiment: Its experiment.
        folder: One of its checkpoints.

    Raises:
        BuildError: It cannot be read, or the text is not there, or it is another one.
    """
    kept, data, rows = run / FILE, experiment.data, experiment.model.vocab_size
    if kept.is_file() and isinstance(data, TokenizerReader):
        tokenizer: Tokenizer | None = built("data", data.read_tokenizer, kept, rows)
    else:
        tokenizer, kept = built("data", data.build, experiment.train, rows).tokenizer, run
    digest = tokenizer_digest(tokenizer)
    if checkpoint.read_state(folder).get("tokenizer", digest) != digest:
        message = f"{kept}: not the tokenizer that the run was trained with, so its tokens mean other text"
        raise BuildError("data", message)
    return tokenizer


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Return the ids under their names in config.json; all null where no text was trained on."""
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    names = _special(json.loads(tokenizer.to_json()))
    pad = next((i for i, token in names.items() if token == _PAD), None)
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": pad}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, length: int) -> None:
    """Write the files of a tokenizer.

    Args:
        folder: Where to.
        tokenizer: The tokenizer.
        length: Positions that the model is meant for.
    """
    description = json.loads(tokenizer.to_json())
    names = _special(description)
    bos, eos = names[tokenizer.bos], names[tokenizer.eos]
    # In the description itself, since not every version of transformers heeds `add_bos_token` for this class.
    description["post_processor"] = _begin_with(bos, tokenizer.bos)
    config: dict[str, Any] = {
        # The class that every version loads as it is: others put back spaces of their own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }
    if _PAD in names.values():
        config["pad_token"] = _PAD
    template = chat_template(tokenizer)
    if template is not None:
        config["chat_template"] = template
    write_json(folder / FILE, description)
    write_json(folder / CONFIG, config)


def chat_template(tokenizer: Tokenizer) -> str | None:
    """Return the template of conversations that a tokenizer has the tokens for: DeepSeek-V3's or none."""
    return _CHAT if {_USER, _ASSISTANT} <= set(special_tokens(tokenizer).values()) else None


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens that were not made from text, by id."""
    return _special(json.loads(tokenizer.to_json()))


def write_json(path: Path, content: object) -> None:
    """Write a value as JSON for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special(description: dict[str, Any]) -> dict[int, str]:
    """Return the added tokens of a tokenizer.json by their id."""
    return {int(token["id"]): str(token["content"]) for token in description["added_tokens"]}


def _begin_with(token: str, number: int) -> dict[str, object]:
    """Return the post-processor that puts one token before a text."""
    first, one, two = {"SpecialToken": {"id": token, "type_id": 0}}, _sequence("A"), _sequence("B")
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, first, two],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _sequence(name: str) -> dict[str, object]:
    return {"Sequence": {"id": name, "type_id": 0}}

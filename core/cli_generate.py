"""The command `generate`; torch is imported inside it."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tangram.core.parameters import Files, Json
from tangram.core.terminal import OK, refuse, say

if TYPE_CHECKING:
    from tangram.core.continuation import Piece, Request
    from tangram.core.contracts import Tokenizer
    from tangram.core.decoding import Decoder


def generate(
    model: Path,
    prompt: str | None = None,
    /,
    *,
    prompts: Path | None = None,
    tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    speculate: bool = False,
    chat: bool = False,
    batch: int = 16,
    ema: bool = False,
    json_: Json = False,
    plugin: Files = (),
) -> int:
    """Continue a text, or many, with a trained model, and show it as it comes.

    Args:
        model: A run directory, or a folder of weights in the format of DeepSeek-V3's release.
        prompt: The text to continue; by default what comes from standard input.
        prompts: A file of texts to continue: one a line, or of a .jsonl file the field `prompt` of each line.
        tokens: Most tokens to make of a text; 128 by default.
        temperature: Divides the logits; 0, the default, takes the likeliest token.
        top_k: Draw from so many of the likeliest tokens only; 0 for all.
        top_p: Draw from the likeliest tokens that together have this probability.
        min_p: Draw from tokens at least this often as probable as the likeliest.
        repetition_penalty: Divides the logits of tokens that are there already; 1 for none.
        seed: Seed of the draws; text i of a file has this seed plus i.
        stop: A string before which a text ends; may be repeated.
        speculate: Draft tokens with the model's MTP modules and verify them: the same text, sooner.
        chat: Take the text as a user's message, by the tokenizer's chat template.
        batch: Most texts that are continued at once; 16 by default.
        ema: Take the averaged weights that the observer ema kept.
        json_: Print a JSON object a line for each text, with its timings.
    """
    from attrs import evolve

    from tangram.core.continuation import Request
    from tangram.core.decoding import Decoder
    from tangram.core.sampling import Sampling
    from tangram.core.trained import as_run, load_model, load_offer

    if batch < 1:
        return refuse("--batch is at least 1")
    texts = _texts(prompt, prompts)
    if isinstance(texts, str):
        return refuse(texts)
    with as_run(model, plugin) as run:
        offer = load_offer(run, plugin, speculate=speculate)
        if chat and offer.chat is None:
            return refuse(f"{model}: its tokenizer has no chat template; leave --chat out")
        try:
            sampling = Sampling(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
            )
            requests = [
                Request(
                    prompt=tuple(
                        offer.chat.prompt([{"role": "user", "content": text}])
                        if chat and offer.chat is not None
                        else [offer.tokenizer.bos, *offer.tokenizer.encode(text)]
                    ),
                    tokens=tokens,
                    sampling=evolve(sampling, seed=seed + number),
                    stop=stop,
                )
                for number, text in enumerate(texts)
            ]
        except ValueError as error:
            return refuse(str(error).replace("'tokens'", "--tokens"))
        room = max(len(request.prompt) for request in requests) + tokens
        if room > offer.length:
            print(f"warning: {room} tokens; the model was trained on {offer.length} at a time", file=sys.stderr)
        decoder = Decoder(load_model(run, plugin, averaged=ema), room, speculate=speculate)
    pieces = _Clocked(decoder, offer.tokenizer, requests, batch)
    if json_:
        for number in pieces.finished():
            print(json.dumps(pieces.told(number, texts[number])), flush=True)
        return OK
    if len(texts) == 1:
        print(texts[0], end="" if not chat else "\n", flush=True)
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print()
    else:
        for number in pieces.finished():
            say(f"--- {number + 1}\n{texts[number]}{pieces.text(number)}")
    print(pieces.summary(), file=sys.stderr)
    return OK


def _texts(prompt: str | None, file: Path | None) -> list[str] | str:
    """Return the texts to continue, or what is wrong."""
    if file is None:
        if prompt is None and sys.stdin.isatty():
            return 'give a text to continue: tangram generate RUN "text", or --prompts FILE'
        return [sys.stdin.read() if prompt is None else prompt]
    if prompt is not None:
        return "give a text or --prompts FILE, not both"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return f"{file} cannot be read: {error}"
    found = []
    for number, line in enumerate(lines, start=1):
        text: object = line
        if file.suffix == ".jsonl":
            try:
                text = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                return f'{file}:{number}: no object with a text: write {{"prompt": "..."}}'
        if text:
            found.append(str(text))
    return found or f"{file} has no text to continue"


class _Clocked:
    """Texts under way, and when what came."""

    def __init__(
        self, decoder: "Decoder", tokenizer: "Tokenizer", requests: "Sequence[Request]", together: int
    ) -> None:
        self._decoder, self._tokenizer, self._requests = decoder, tokenizer, requests
        self._together = together
        self._began = time.perf_counter()
        self._texts = [""] * len(requests)
        self._tokens = [0] * len(requests)
        self._first = [0.0] * len(requests)
        self._ended = [0.0] * len(requests)
        self._reasons = [""] * len(requests)

    def __iter__(self) -> "Iterator[Piece]":
        from tangram.core.continuation import continue_all

        for piece in continue_all(self._decoder, self._tokenizer, self._requests, together=self._together):
            now = time.perf_counter() - self._began
            self._texts[piece.number] += piece.text
            self._tokens[piece.number] = piece.tokens
            self._first[piece.number] = self._first[piece.number] or now
            if piece.reason is not None:
                self._ended[piece.number], self._reasons[piece.number] = now, piece.reason
            yield piece

    def finished(self) -> Iterator[int]:
        """Yield the numbers of the texts as they end, in order."""
        following = 0
        for _ in self:
            while following < len(self._reasons) and self._reasons[following]:
                yield following
                following += 1

    def text(self, number: int) -> str:
        """Return what a text was continued with."""
        return self._texts[number]

    def told(self, number: int, prompt: str) -> dict[str, object]:
        """Return a text and its timings; what speculation did is of all texts so far."""
        return {
            "prompt": prompt,
            "text": self._texts[number],
            "reason": self._reasons[number],
            "prompt_tokens": len(self._requests[number].prompt),
            "tokens": self._tokens[number],
            "seconds": round(self._ended[number], 4),
            "seconds_to_first": round(self._first[number], 4),
        } | self._speculation()

    def _speculation(self) -> dict[str, object]:
        tally = self._decoder.tally
        if not tally.offered:
            return {}
        kept = [round(share, 4) for share in tally.acceptance]
        return {"acceptance": kept, "tokens_per_round": round(tally.tokens_per_round, 4)}

    def summary(self) -> str:
        """Return how long all took."""
        tally, seconds = self._decoder.tally, max(self._ended)
        line = f"{tally.tokens} tokens in {seconds:.2f} s, {tally.tokens / seconds:.1f} a second"
        for depth, kept in enumerate(tally.acceptance, start=1):
            line += f"; {kept:.0%} of the drafts at depth {depth} kept"
        if tally.offered:
            line += f", {tally.tokens_per_round:.2f} tokens a round"
        return line

"""What a model thinks of given texts, and how it goes on with them: all that a harness asks of it."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from attrs import evolve
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tangram.core.continuation import Request, continue_all
from tangram.core.contracts import Tokenizer
from tangram.core.decoding import Decoder
from tangram.core.model import Model
from tangram.core.records import IGNORE, Batch, Carry, Progress, one_document
from tangram.core.sampling import Sampling

_LOGITS_AT_ONCE = 512
"""Tokens whose logits are there at once: those of a large vocabulary are wide."""


class Scored(NamedTuple):
    """What a model thinks of a text: its log-probability in nats, and whether each token is the likeliest."""

    logprob: float
    greedy: bool


class Window(NamedTuple):
    """Tokens that one forward reads, of which those from `first` on are scored: whose they are, and what."""

    text: int
    tokens: Sequence[int]
    first: int


def spans(total: int, first: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows (start, begin, end) of a text that score each token from `first` on once.

    Tokens `start` to `end` - 2 are read and `begin` to `end` - 1 are scored, each from at most `length` tokens before.

    Args:
        total: Tokens of the text.
        first: The first to be scored; at least 1.
        length: Most tokens that are read at once.
    """
    for begin in range(first, total, length):
        end = min(begin + length, total)
        yield max(0, end - 1 - length), begin, end


class Scorer:
    """Asks a model about texts, in batches of similar length.

    Args:
        model: The model; this rank holds all its layers.
        tokenizer: What its tokens say.
        length: Tokens of the sequences that it was trained on: it is shown no more at once.
        at_once: Tokens of a batch, padding among them.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, length: int, *, at_once: int = 4096) -> None:
        self._model, self.tokenizer, self.length, self._at_once = model, tokenizer, length, at_once
        self._device = next(model.parameters()).device

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Return what the model thinks of each continuation of a context, (context, continuation).

        The tokens are those of both together. The continuation's begin where they first differ from the context's: a
        token that spans both is the continuation's, and so are spaces at the end of the context. Of a text that is too
        long the beginning is not shown.
        """
        texts = [self._divided(context, continuation) for context, continuation in pairs]
        long = sum(len(tokens) - 1 > self.length for tokens, _ in texts)
        if long:
            self.remark(f"{long} of {len(texts)} texts are longer", "their beginnings were left out")
        return self.scores(texts)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Return each text's log-probability: every token once, of a long text in windows that do not overlap.

        Only the last window also reads what stands before it, as much as there is room for.
        """
        tokens = [[self.tokenizer.bos, *self.tokenizer.encode(text)] for text in texts]
        return [scored.logprob for scored in self.scores([(each, 1) for each in tokens])]

    def _divided(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Return the tokens of both together, and where those of the continuation begin."""
        whole = self.tokenizer.encode(context + continuation)
        before = self.tokenizer.encode(context.rstrip())
        same = takewhile(lambda both: both[0] == both[1], zip(whole, before, strict=False))
        return [self.tokenizer.bos, *whole], 1 + sum(1 for _ in same)

    def scores(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[Scored]:
        """Return what the model thinks of the tokens from a place on, (tokens, place); the place is at least 1."""
        windows = [
            Window(number, tokens[start:end], begin - start)
            for number, (tokens, first) in enumerate(texts)
            for start, begin, end in spans(len(tokens), first, self.length)
        ]
        nats, greedy = [0.0] * len(texts), [True] * len(texts)
        for group in self._grouped(windows):
            for window, (logprob, likeliest) in zip(group, self._judged(group), strict=True):
                nats[window.text] += logprob
                greedy[window.text] &= likeliest
        return [Scored(*both) for both in zip(nats, greedy, strict=True)]

    def _grouped(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Yield windows of similar length together, as many as a batch holds."""
        group: list[Window] = []
        for window in sorted(windows, key=lambda window: len(window.tokens)):
            if group and (len(group) + 1) * len(window.tokens) > self._at_once:
                yield group
                group = []
            group.append(window)
        if group:
            yield group

    @torch.inference_mode()
    def _judged(self, windows: Sequence[Window]) -> list[Scored]:
        read = pad_sequence([torch.tensor(window.tokens[:-1]) for window in windows], batch_first=True)
        hidden = self._trunk(self._documents(read.to(self._device)))
        # What is padded stands behind, where nothing that counts sees it.
        picked = torch.cat(
            [hidden[row, window.first - 1 : len(window.tokens) - 1] for row, window in enumerate(windows)]
        )
        wanted = torch.tensor([t for window in windows for t in window.tokens[window.first :]], device=self._device)
        sizes = [len(window.tokens) - window.first for window in windows]
        parts = zip(picked.split(_LOGITS_AT_ONCE), wanted.split(_LOGITS_AT_ONCE), strict=True)
        logprobs, likeliest = zip(*(self._against(*part) for part in parts), strict=True)
        nats = [float(part.double().sum()) for part in torch.cat(logprobs).split(sizes)]
        return [Scored(n, bool(part.all())) for n, part in zip(nats, torch.cat(likeliest).split(sizes), strict=True)]

    def _against(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return for residual streams [M, D] the log-probability of what is wanted, and whether it is the likeliest."""
        shared = self._model.shared
        logits = shared.head(shared.norm(hidden[None]))[0]  # [M, V]
        return logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1), logits.argmax(-1) == wanted

    @torch.inference_mode()
    def nats(self, batch: Batch) -> Tensor:
        """Return the loss of each target of a batch in nats, on the CPU [B, S]; zero where there is none."""
        assert batch.targets is not None
        wanted = batch.targets.flatten()
        hidden = self._trunk(evolve(batch, targets=None).to(self._device)).flatten(0, 1)
        parts = zip(hidden.split(_LOGITS_AT_ONCE), wanted.clamp(min=0).split(_LOGITS_AT_ONCE), strict=True)
        logprobs = torch.cat([self._against(part, asked.to(self._device))[0].cpu() for part, asked in parts])
        return -logprobs.where(wanted != IGNORE, 0.0).view_as(batch.targets)

    def _documents(self, tokens: Tensor) -> Batch:
        """Return a batch of tokens [B, S] to read, each row one document."""
        positions = torch.arange(tokens.shape[1], device=self._device).expand_as(tokens)
        return Batch(tokens, None, positions, one_document(tokens), 0, len(tokens))

    def _trunk(self, batch: Batch) -> Tensor:
        """Return the residual stream [B, S, D] of a batch."""
        carry: Carry = self._model(batch, Progress())
        assert carry.trunk is not None
        return carry.trunk

    def asked(self, prompt: str, tokens: int, stop: Sequence[str], sampling: Sampling) -> Request:
        """Return the request to go on with a prompt by so many tokens, or as many as there is room for.

        A prompt that is too long loses its beginning; what is to be made gets at least half of the room if it asks
        for so much.
        """
        whole = [self.tokenizer.bos, *self.tokenizer.encode(prompt)]
        kept = whole[-(self.length - min(tokens, self.length // 2)) :]
        made = min(tokens, self.length - len(kept))
        if len(kept) < len(whole) or made < tokens:
            self.remark(f"a prompt of {len(whole)} tokens and {tokens} more are longer", f"{len(kept)} and {made} fit")
        return Request(prompt=tuple(kept), tokens=made, sampling=sampling, stop=tuple(stop))

    def continued(self, requests: Sequence[Request]) -> list[str]:
        """Return how the model goes on, for each request."""
        texts = [""] * len(requests)
        if requests:
            room = max(len(request.prompt) + request.tokens for request in requests)
            together = max(1, min(16, self._at_once // room))
            decoder = Decoder(self._model, room)
            for piece in continue_all(decoder, self.tokenizer, requests, together=together):
                texts[piece.number] += piece.text
        return texts

    def remark(self, what: str, then: str) -> None:
        """Tell that something is longer than the model has seen, and what then happens."""
        warnings.warn(f"{what} than the {self.length} tokens that the run was trained on: {then}", stacklevel=3)

"""Continuing sequences from the cache: several at once, each by a token a round, or by several with speculation.

With speculation the model's own MTP modules draft the next tokens, one forward of the trunk verifies them all, and
those are kept up to the first that the trunk would not have chosen (arXiv:2412.19437, section 5.4.3). What is kept is
distributed as without drafts (arXiv:2211.17192), and greedily it is the same.
"""

from collections.abc import Generator, Iterator, Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tangram.core.contracts import Cache, Tokenizer
from tangram.core.lanes import Lanes
from tangram.core.model import Model
from tangram.core.recorded import Recorded
from tangram.core.records import Batch, Carry, Progress, one_document
from tangram.core.sampling import Sampling
from tangram.core.speculation import Drafts, Running, Tally, agreed, judged


@frozen(eq=False)
class Packet:
    """A sequence on its way from one decoder of a model to another.

    Attributes:
        running: The sequence.
        trunk: What each layer's cache keeps of it.
        modules: What the cache of each module that drafts keeps of it.
    """

    running: Running
    trunk: tuple[Tensor, ...]
    modules: tuple[Tensor, ...]


class Decoder:
    """Sequences that are continued together. Sequences may come and go between rounds.

    Where ranks share out the experts each takes every round, also when it has no sequence left, and all admit prompts
    of one length at the same time.

    Args:
        model: The model; this rank holds all its layers.
        length: Most tokens of a sequence.
        speculate: Draft tokens with the model's MTP modules.
        chunk: Tokens of a prompt that are worked at once.

    Attributes:
        running: The sequences.
        tally: What speculation did.

    Raises:
        ValueError: The model has no modules to draft with, or this rank does not hold all its layers.
    """

    def __init__(self, model: Model, length: int, *, speculate: bool = False, chunk: int = 512) -> None:
        if len(model.blocks) < model.n_layers:
            raise ValueError(f"this rank holds {len(model.blocks)} of {model.n_layers} layers; decoding takes them all")
        if model.n_stages > 1:
            raise ValueError(f"the model has {model.n_stages} stages; decoding takes it as one")
        self.model, self.chunk = model, chunk
        self._device = next(model.parameters()).device
        self._lanes = Lanes(self._device)
        self._drafts = Drafts(model) if speculate else None
        self.length = length
        self._room = length + (self._drafts.depth if self._drafts else 0)  # drafts stand behind the last token
        self.running: list[Running] = []
        self.tally = Tally()
        self._goes_on(*self._new_caches(0, self._room))

    def _new_caches(self, batch: int, length: int) -> tuple[list[Cache], list[Cache]]:
        trunk = [block.attention.new_cache(batch, length) for _, block in self.model.trunk()]
        return trunk, [] if self._drafts is None else self._drafts.new_caches(batch, length)

    def _goes_on(self, trunk: list[Cache], modules: list[Cache]) -> None:
        """Take these caches, of other sequences than before."""
        self._trunk, self._modules = trunk, modules
        # Ranks that share out experts must all go the same way, whatever the shapes of each.
        alone = self.model.expert_ranks == 1
        self._recorded = Recorded(self._whole, trunk if alone else [])
        if self._drafts is not None:
            self._drafts.goes_on(modules if alone else [])

    @property
    def cache_bytes(self) -> int:
        """Bytes that the trunk's caches hold."""
        return sum(cache.nbytes for cache in self._trunk)

    @torch.inference_mode()
    def admit(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], draws: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Take up sequences with these prompts; return the first token of each.

        Args:
            prompts: Their tokens.
            samplings: How theirs are drawn.
            draws: Random numbers that each has drawn before, where a prompt is a text that was being continued.

        Raises:
            ValueError: A prompt is empty, or leaves no room for a token.
        """
        if not all(0 < len(prompt) < self.length for prompt in prompts):
            raise ValueError(f"a prompt has 1 to {self.length - 1} tokens; these have {[len(p) for p in prompts]}")
        before = [0] * len(prompts) if draws is None else draws
        new = [Running(list(prompt), how, n) for prompt, how, n in zip(prompts, samplings, before, strict=True)]
        first = not self.running
        caches = self._new_caches(len(new), self._room if first else max(map(len, prompts)))
        last = self._read(new, *caches)
        made = self._chosen(new, self._logits(last[:, None]))
        if self._drafts is not None:
            self._drafts.draft(new, list(last[:, None]), caches[1])
        if first:
            self._goes_on(*caches)
        else:
            for own, other in zip((*self._trunk, *self._modules), (*caches[0], *caches[1]), strict=True):
                for row in range(len(new)):
                    own.admit(other.kept(row))
            self._goes_on(self._trunk, self._modules)
        self.running += new
        return made

    def step(self) -> list[list[int]]:
        """Return each sequence's next tokens: one, and as many of its drafts as were kept before it."""
        return step_together(self)[0]

    def _round(self, made: list[list[int]]) -> Iterator[str]:
        """Take a round, and before each phase of the trunk yield its lane; the tokens are added to `made`."""
        if not self.running and self.model.expert_ranks == 1:
            return
        starts = [len(one.tokens) - 1 for one in self.running]
        rows = [one.tokens[-1:] + one.drafts for one in self.running]
        tokens = torch.tensor(rows, dtype=torch.int64, device=self._device).view(len(rows), -1 if rows else 1)
        positions = self._positions(starts, tokens.shape[1])
        out = self._recorded.again(tokens, positions)
        if out is None:
            hidden = yield from self._phases(tokens, positions, self._trunk)
            out = hidden, self._logits(hidden)
        hidden, logits = out
        made += self._chosen(self.running, logits)
        self._shorten(starts, made)
        if self._drafts is not None:
            newest = [hidden[row, : len(tokens)] for row, tokens in enumerate(made)]
            self._drafts.draft(self.running, newest, self._modules)

    def _shorten(self, starts: Sequence[int], made: Sequence[Sequence[int]]) -> None:
        """Forget the drafts that were not kept."""
        if any(len(tokens) <= len(one.drafts) for one, tokens in zip(self.running, made, strict=True)):
            lengths = torch.tensor([start + len(tokens) for start, tokens in zip(starts, made, strict=True)])
            for cache in self._trunk:
                cache.truncate(lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all sequences but these."""
        if list(rows) == list(range(len(self.running))):
            return
        self.running = [self.running[row] for row in rows]
        chosen = torch.tensor(rows, dtype=torch.int64)
        caches = [[cache.fork(chosen) for cache in own] for own in (self._trunk, self._modules)]
        self._goes_on(*caches)

    @torch.inference_mode()
    def release(self, row: int) -> Packet:
        """Let go of a sequence; return what another decoder needs to go on with it."""
        kept = [[cache.kept(row).clone() for cache in caches] for caches in (self._trunk, self._modules)]
        packet = Packet(self.running[row], tuple(kept[0]), tuple(kept[1]))
        self.keep([other for other in range(len(self.running)) if other != row])
        return packet

    @torch.inference_mode()
    def take(self, packet: Packet) -> None:
        """Go on with a sequence that another decoder released.

        Raises:
            ValueError: It leaves no room for a token, or one of the two speculates and the other does not.
        """
        one, caches = packet.running, (*self._trunk, *self._modules)
        if len(one.tokens) >= self.length:
            raise ValueError(f"a sequence has at most {self.length - 1} tokens; this has {len(one.tokens)}")
        if (len(packet.trunk), len(packet.modules)) != (len(self._trunk), len(self._modules)):
            raise ValueError("a sequence goes from one decoder to another only if both speculate, or neither")
        for cache, entries in zip(caches, (*packet.trunk, *packet.modules), strict=True):
            cache.admit(entries)
        self._goes_on(self._trunk, self._modules)
        one.guesses = [guess.to(self._device) for guess in one.guesses]
        one.carried = {k: hidden.to(self._device) for k, hidden in one.carried.items()}
        self.running.append(one)

    def _phases(self, tokens: Tensor, positions: Tensor, trunk: Sequence[Cache]) -> Generator[str, None, Tensor]:
        """Return the residual stream [B, S, D] of tokens [B, S] at positions [B, S]; before each phase, its lane."""
        batch = Batch(tokens, None, positions, one_document(tokens), 0, len(tokens))
        carry, lane = Carry(), ""
        for phase in self.model.phases(0, batch, Progress(), trunk):
            yield phase.lane
            if phase.lane != lane:
                self._lanes.hold(carry)
            carry, lane = phase.fn(carry), phase.lane
        assert carry.trunk is not None
        return carry.trunk

    def _logits(self, hidden: Tensor) -> Tensor:
        shared = self.model.shared
        return shared.head(shared.norm(hidden))

    def _whole(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream [B, S, D] and the logits [B, S, V] of the next tokens [B, S] of all sequences."""
        hidden = _done(self._phases(tokens, positions, self._trunk))
        return hidden, self._logits(hidden)

    def _positions(self, starts: Sequence[int], count: int) -> Tensor:
        """Return the positions [B, count] of tokens that begin at these."""
        first = torch.tensor(starts, dtype=torch.int64, device=self._device)[:, None]
        return first + torch.arange(count, device=self._device)

    def _read(self, new: Sequence[Running], trunk: Sequence[Cache], modules: Sequence[Cache]) -> Tensor:
        """Put prompts through the trunk and the modules; return the residual stream [B, D] of their last tokens."""
        sizes = [len(one.tokens) for one in new]
        padded = pad_sequence([torch.tensor(one.tokens) for one in new], batch_first=True).to(self._device)
        last: list[Tensor | None] = [None] * len(new)
        for start in range(0, max(sizes), self.chunk):
            stop = min(start + self.chunk, max(sizes))
            positions = self._positions([start] * len(new), stop - start)
            hidden = _done(self._phases(padded[:, start:stop], positions, trunk))
            if min(sizes) < stop:
                for cache in trunk:
                    cache.truncate(torch.tensor([min(size, stop) for size in sizes]))
            for row, size in enumerate(sizes):
                if start < size <= stop:
                    last[row] = hidden[row, size - start - 1]
            if self._drafts is not None:  # the last token's position waits for the token after it
                known = [hidden[row, : max(min(size - 1, stop) - start, 0)] for row, size in enumerate(sizes)]
                self._drafts.follow(new, known, modules)
        return torch.stack([each for each in last if each is not None])

    def _chosen(self, sequences: Sequence[Running], logits: Tensor) -> list[list[int]]:
        """Add to each sequence the drafts that are kept and one token more; return them.

        Args:
            sequences: The sequences.
            logits: Of the token after the newest one, and after each draft, [B, 1 + drafts, V].
        """
        if all(one.sampling.plain for one in sequences):
            made = [agreed(one.drafts, row) for one, row in zip(sequences, logits.argmax(-1).tolist(), strict=True)]
        else:
            made = judged(sequences, logits)
        for one, tokens in zip(sequences, made, strict=True):
            one.tokens += tokens
            self.tally.count(len(one.drafts), len(tokens) - 1)
        return made


def _done(phases: Generator[str, None, Tensor]) -> Tensor:
    """Return what phases give, taken one after the other."""
    while True:
        try:
            next(phases)
        except StopIteration as end:
            hidden: Tensor = end.value
            return hidden


@torch.inference_mode()
def step_together(*decoders: Decoder) -> list[list[list[int]]]:
    """Take a round of several decoders side by side; return what `step` of each would.

    With experts on several ranks this hides the way to them: while the tokens of one decoder travel, the other is at
    its attention (arXiv:2412.19437, section 3.4.2, which takes two micro-batches of like work). The ranks give their
    decoders in the same order.
    """
    made: list[list[list[int]]] = [[] for _ in decoders]
    rounds = [decoder._round(tokens) for decoder, tokens in zip(decoders, made, strict=True)]
    decoders[0]._lanes.side_by_side(*(_later(work, number % 2) for number, work in enumerate(rounds)))
    return made


def _later(work: Iterator[str], phases: int) -> Iterator[str]:
    """Yield the lanes of a work that begins so many phases late: one, and what sends meets what computes."""
    for _ in range(phases):
        yield "compute"
    yield from work


def generate(
    model: Model, prompt: Tensor, count: int, *, sampling: Sampling | None = None, speculate: bool = False
) -> Tensor:
    """Return `count` tokens that continue prompt int64 [B, S], int64 [B, count]; row i is drawn with seed + i.

    Args:
        model: The model.
        prompt: Sequences of one length, each one document.
        count: Tokens to make.
        sampling: How they are drawn; greedily by default.
        speculate: Draft with the model's MTP modules.
    """
    chosen = sampling or Sampling()
    samplings = [evolve(chosen, seed=chosen.seed + row) for row in range(len(prompt))]
    decoder = Decoder(model, prompt.shape[1] + count, speculate=speculate)
    decoder.admit(prompt.tolist(), samplings)
    rows = list(decoder.running)
    _continue_by(decoder, count)
    made = [one.tokens[prompt.shape[1] :][:count] for one in rows]
    return torch.tensor(made, dtype=torch.int64, device=prompt.device).view(len(rows), count)


def _continue_by(decoder: Decoder, count: int) -> None:
    """Go on until every sequence, of which each has one token now, has `count` of them, and let go of it."""
    ends = {id(one): len(one.tokens) - 1 + count for one in decoder.running}
    while decoder.running:
        decoder.keep([row for row, one in enumerate(decoder.running) if len(one.tokens) < ends[id(one)]])
        decoder.step()


def speculated(model: Model, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling) -> Tally:
    """Return what speculation does while each prompt is continued by `count` tokens, at least.

    Raises:
        ValueError: The model has no modules to draft with.
    """
    decoder = Decoder(model, max(map(len, prompts)) + count + 1, speculate=True)
    decoder.admit(prompts, [evolve(sampling, seed=sampling.seed + row) for row in range(len(prompts))])
    _continue_by(decoder, count)
    return decoder.tally


def sample(model: Model, tokenizer: Tokenizer, prompt: str, count: int, *, sampling: Sampling) -> str:
    """Return `prompt` and its continuation by `count` tokens, up to the end of the document."""
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt)]])
    made = generate(model, ids, count, sampling=sampling)[0].tolist()
    if tokenizer.eos in made:
        made = made[: made.index(tokenizer.eos)]
    return prompt + tokenizer.decode(made)

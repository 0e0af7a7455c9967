"""Continuing sequences from the cache: several at once, each by a token a round, or by several with speculation.

With speculation the model's own MTP modules draft the next tokens, one forward of the trunk verifies them all, and
those are kept up to the first that the trunk would not have chosen (arXiv:2412.19437, section 5.4.3). What is kept is
distributed as without drafts (arXiv:2211.17192), and greedily it is the same.

At the beginning of a round a sequence has T tokens, of which the trunk has seen T - 1. Module k has seen the positions
0 to T - 1 - k, for at position i it reads token i + k. In a round it goes on to T - 2 with what is drafted, and what
rests on drafts is forgotten again.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tangram.core.contracts import Cache, Drafter, Tokenizer
from tangram.core.lanes import side_by_side
from tangram.core.model import Model
from tangram.core.records import Batch, Carry, Phase, Progress
from tangram.core.sampling import Sampling, distribution, drawn, left_over, uniform


@define(eq=False)
class Running:
    """A sequence that is being continued.

    Attributes:
        tokens: Its tokens, the prompt's among them.
        sampling: How they are drawn.
        draws: Random numbers drawn so far.
        drafts: Tokens that are guessed to come next.
        guesses: Probabilities [V] that they were drawn with; none where the likeliest was taken.
        carried: For each module but the first, what the one before gave [D] at the first position that it has not seen.
    """

    tokens: list[int]
    sampling: Sampling
    draws: int = 0
    drafts: list[int] = field(factory=list)
    guesses: list[Tensor] = field(factory=list)
    carried: dict[int, Tensor] = field(factory=dict)

    def uniform(self) -> float:
        """Return the next random number in [0, 1)."""
        self.draws += 1
        return uniform(self.sampling.seed, self.draws - 1)


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


@define
class Tally:
    """What speculation did.

    Attributes:
        rounds: Forwards of the trunk for a sequence.
        tokens: Tokens that they gave.
        offered: For each depth, drafts whose predecessors were all kept.
        accepted: For each depth, how many of those were kept.
    """

    rounds: int = 0
    tokens: int = 0
    offered: list[int] = field(factory=list)
    accepted: list[int] = field(factory=list)

    def count(self, drafted: int, kept: int) -> None:
        """Count a round of one sequence in which the first `kept` of `drafted` drafts were kept."""
        self.rounds += 1
        self.tokens += kept + 1
        more = drafted - len(self.offered)
        self.offered += [0] * more
        self.accepted += [0] * more
        for depth in range(min(kept + 1, drafted)):
            self.offered[depth] += 1
            self.accepted[depth] += depth < kept


class Decoder:
    """Sequences that are continued together. Sequences may come and go between rounds.

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
        # Of ranks that share out the experts each takes every round, with sequences of its own or without.
        experts = max(model.experts, default=0)
        self._waited_for = any(len(own) < experts for own in model.shares().values())
        self._device = next(model.parameters()).device
        self._drafter = drafter_of(model) if speculate else None
        self.length = length
        self._room = length + (self._drafter.depth if self._drafter else 0)  # drafts stand behind the last token
        self.running: list[Running] = []
        self.tally = Tally()
        self._trunk, self._modules = self._new_caches(0, self._room)

    def _new_caches(self, batch: int, length: int) -> tuple[list[Cache], list[Cache]]:
        trunk = [block.attention.new_cache(batch, length) for _, block in self.model.trunk()]
        drafter = self._drafter
        depth = 0 if drafter is None else drafter.depth
        return trunk, [drafter.new_cache(k + 1, batch, length) for k in range(depth) if drafter is not None]

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
        self._draft(new, list(last[:, None]), caches[1])
        if first:
            self._trunk, self._modules = caches
        else:
            for own, other in zip((*self._trunk, *self._modules), (*caches[0], *caches[1]), strict=True):
                for row in range(len(new)):
                    own.admit(other.kept(row))
        self.running += new
        return made

    def step(self) -> list[list[int]]:
        """Return each sequence's next tokens: one, and as many of its drafts as were kept before it."""
        return step_together(self)[0]

    def _round(self, made: list[list[int]]) -> Iterator[str]:
        """Take a round, and before each phase of the trunk yield its lane; the tokens are added to `made`."""
        if not self.running and not self._waited_for:
            return
        starts = [len(one.tokens) - 1 for one in self.running]
        rows = [one.tokens[-1:] + one.drafts for one in self.running]
        tokens = torch.tensor(rows, dtype=torch.int64, device=self._device).view(len(rows), -1 if rows else 1)
        carry = Carry()
        for phase in self._phases(tokens, starts, self._trunk):
            yield phase.lane
            carry = phase.fn(carry)
        assert carry.trunk is not None
        hidden = carry.trunk
        made += self._chosen(self.running, self._logits(hidden))
        self._shorten(self._trunk, starts, made)
        self._draft(self.running, [hidden[row, : len(tokens)] for row, tokens in enumerate(made)], self._modules)

    def _shorten(self, caches: Iterable[Cache], starts: Sequence[int], made: Sequence[Sequence[int]]) -> None:
        """Forget the drafts that were not kept."""
        if any(len(tokens) <= len(one.drafts) for one, tokens in zip(self.running, made, strict=True)):
            lengths = torch.tensor([start + len(tokens) for start, tokens in zip(starts, made, strict=True)])
            for cache in caches:
                cache.truncate(lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all sequences but these."""
        if list(rows) == list(range(len(self.running))):
            return
        self.running = [self.running[row] for row in rows]
        chosen = torch.tensor(rows, dtype=torch.int64)
        self._trunk = [cache.fork(chosen) for cache in self._trunk]
        self._modules = [cache.fork(chosen) for cache in self._modules]

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
        one.guesses = [guess.to(self._device) for guess in one.guesses]
        one.carried = {k: hidden.to(self._device) for k, hidden in one.carried.items()}
        self.running.append(one)

    def _forward(self, tokens: Tensor, starts: Sequence[int], caches: Sequence[Cache]) -> Tensor:
        """Return the trunk's residual stream [B, S, D] of tokens [B, S] that begin at these positions."""
        carry = Carry()
        for phase in self._phases(tokens, starts, caches):
            carry = phase.fn(carry)
        assert carry.trunk is not None
        return carry.trunk

    def _phases(self, tokens: Tensor, starts: Sequence[int], caches: Sequence[Cache]) -> list[Phase]:
        """Return the trunk's phases for tokens [B, S] that begin at these positions."""
        positions = self._positions(starts, tokens.shape[1])
        batch = Batch(tokens, None, positions, torch.zeros_like(tokens), 0, len(tokens))
        return self.model.phases(0, batch, Progress(), caches)

    def _positions(self, starts: Sequence[int], count: int) -> Tensor:
        return torch.tensor(starts, device=self._device)[:, None] + torch.arange(count, device=self._device)

    def _logits(self, hidden: Tensor) -> Tensor:
        shared = self.model.shared
        return shared.head(shared.norm(hidden))

    def _read(self, new: Sequence[Running], trunk: Sequence[Cache], modules: Sequence[Cache]) -> Tensor:
        """Put prompts through the trunk and the modules; return the residual stream [B, D] of their last tokens."""
        sizes = [len(one.tokens) for one in new]
        padded = pad_sequence([torch.tensor(one.tokens) for one in new], batch_first=True).to(self._device)
        last: list[Tensor | None] = [None] * len(new)
        for start in range(0, max(sizes), self.chunk):
            stop = min(start + self.chunk, max(sizes))
            hidden = self._forward(padded[:, start:stop], [start] * len(new), trunk)
            if min(sizes) < stop:
                for cache in trunk:
                    cache.truncate(torch.tensor([min(size, stop) for size in sizes]))
            for row, size in enumerate(sizes):
                if start < size <= stop:
                    last[row] = hidden[row, size - start - 1]
            # The last token's position waits for the token after it.
            known = [hidden[row, : max(min(size - 1, stop) - start, 0)] for row, size in enumerate(sizes)]
            self._follow(new, known, modules)
        return torch.stack([each for each in last if each is not None])

    def _follow(self, sequences: Sequence[Running], trunk: Sequence[Tensor], caches: Sequence[Cache]) -> None:
        """Put what the trunk gave through the modules, as far as the prompts' tokens reach."""
        inputs = list(trunk)
        for k, cache in enumerate(caches, start=1):
            starts = cache.lengths.tolist()
            known = [one.tokens[start + k :] for one, start in zip(sequences, starts, strict=True)]
            inputs = self._with_carried(sequences, inputs, k)
            widths = [min(len(hidden), len(tokens)) for hidden, tokens in zip(inputs, known, strict=True)]
            fed = [hidden[:width] for hidden, width in zip(inputs, widths, strict=True)]
            for one, hidden, width in zip(sequences, inputs, widths, strict=True):
                if k > 1 and width < len(hidden):
                    one.carried[k] = hidden[width]
            inputs = self._through(k, fed, known, starts, cache)

    def _with_carried(self, sequences: Sequence[Running], inputs: Sequence[Tensor], k: int) -> list[Tensor]:
        """Return what module k reads, with what was left over for it before."""
        joined = []
        for one, hidden in zip(sequences, inputs, strict=True):
            before = one.carried.pop(k, None)
            joined.append(hidden if before is None else torch.cat([before[None], hidden]))
        return joined

    def _through(
        self, k: int, inputs: Sequence[Tensor], tokens: Sequence[Sequence[int]], starts: Sequence[int], cache: Cache
    ) -> list[Tensor]:
        """Return what module k gives [n, D] for inputs [n, D] of every sequence, and tokens from these positions on."""
        drafter = self._drafter
        assert drafter is not None
        widths = [len(hidden) for hidden in inputs]
        if not max(widths):
            return list(inputs)
        read = [torch.tensor(own[:width], dtype=torch.int64) for own, width in zip(tokens, widths, strict=True)]
        out = drafter.draft(
            k,
            pad_sequence(list(inputs), batch_first=True),
            pad_sequence(read, batch_first=True).to(self._device),
            self._positions(starts, max(widths)),
            cache,
            self.model.shared,
        )
        if min(widths) < max(widths):
            cache.truncate(torch.tensor([start + width for start, width in zip(starts, widths, strict=True)]))
        return [out[row, :width] for row, width in enumerate(widths)]

    def _draft(self, sequences: Sequence[Running], trunk: list[Tensor], caches: Sequence[Cache]) -> None:
        """Draft what comes next, given the trunk's residual stream [n, D] at the newest positions up to T - 2."""
        drafter = self._drafter
        for one in sequences:
            one.drafts, one.guesses = [], []
        if drafter is None:
            return
        inputs = trunk
        for k, cache in enumerate(caches, start=1):
            starts = cache.lengths.tolist()
            tokens = [(one.tokens + one.drafts)[start + k :] for one, start in zip(sequences, starts, strict=True)]
            outs = self._through(k, inputs, tokens, starts, cache)
            seen = [max(len(one.tokens) - k, 0) for one in sequences]
            cache.truncate(torch.tensor(seen))
            if k < drafter.depth:
                inputs = self._with_carried(sequences, outs, k + 1)
                for one, start, out, n in zip(sequences, starts, outs, seen, strict=True):
                    if n > 0:
                        one.carried[k + 1] = out[n - 1 - start]
            self._guess(sequences, drafter.logits(k, torch.stack([out[-1:] for out in outs]), self.model.shared)[:, 0])

    def _guess(self, sequences: Sequence[Running], logits: Tensor) -> None:
        """Draw the next draft of each sequence."""
        if all(one.sampling.plain for one in sequences):
            for one, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
                one.drafts.append(token)
            return
        shares = _shares(sequences, logits, [one.drafts for one in sequences])
        tokens = drawn(shares, [one.uniform() for one in sequences])
        for one, token, guess in zip(sequences, tokens, shares, strict=True):
            one.drafts.append(token)
            one.guesses.append(guess)

    def _chosen(self, sequences: Sequence[Running], logits: Tensor) -> list[list[int]]:
        """Add to each sequence the drafts that are kept and one token more; return them.

        Args:
            sequences: The sequences.
            logits: Of the token after the newest one, and after each draft, [B, 1 + drafts, V].
        """
        if all(one.sampling.plain for one in sequences):
            made = [_agreed(one.drafts, row) for one, row in zip(sequences, logits.argmax(-1).tolist(), strict=True)]
        else:
            made = _judged(sequences, logits)
        for one, tokens in zip(sequences, made, strict=True):
            one.tokens += tokens
            self.tally.count(len(one.drafts), len(tokens) - 1)
        return made


@torch.inference_mode()
def step_together(*decoders: Decoder) -> list[list[list[int]]]:
    """Take a round of several decoders side by side; return what `step` of each would.

    With experts on several ranks this hides the way to them: while the tokens of one decoder travel, the other is at
    its attention (arXiv:2412.19437, section 3.4.2, which takes two micro-batches of like work). The ranks give their
    decoders in the same order.
    """
    made: list[list[list[int]]] = [[] for _ in decoders]
    rounds = [decoder._round(tokens) for decoder, tokens in zip(decoders, made, strict=True)]
    side_by_side(*(_later(work, number % 2) for number, work in enumerate(rounds)))
    return made


def _later(work: Iterator[str], phases: int) -> Iterator[str]:
    """Yield the lanes of a work that begins so many phases late: one, and what sends meets what computes."""
    for _ in range(phases):
        yield "compute"
    yield from work


def drafter_of(model: Model) -> Drafter:
    """Return what drafts tokens.

    Raises:
        ValueError: The model has nothing that does.
    """
    for _, objective in model.token_objectives():
        if isinstance(objective, Drafter):
            return objective
    raise ValueError("the model has no modules that draft tokens: train it with the objective mtp to speculate")


def _agreed(drafts: Sequence[int], likeliest: Sequence[int]) -> list[int]:
    """Return the drafts up to the first that is not the likeliest token, and then the likeliest."""
    kept = next((i for i, draft in enumerate(drafts) if draft != likeliest[i]), len(drafts))
    return [*drafts[:kept], likeliest[kept]]


def _shares(sequences: Sequence[Running], logits: Tensor, more: Sequence[Sequence[int]]) -> Tensor:
    """Return the probabilities [B, V] of each sequence's next token after its own and these."""
    seen = [[*one.tokens, *drafts] for one, drafts in zip(sequences, more, strict=True)]
    return distribution(logits, [one.sampling for one in sequences], seen)


def _judged(sequences: Sequence[Running], logits: Tensor) -> list[list[int]]:
    """Return for each sequence the drafts that are kept, each with probability min(1, p / q), and one token more."""
    made: list[list[int]] = [[] for _ in sequences]
    going = list(range(len(sequences)))
    for depth in range(logits.shape[1]):
        own = [sequences[row] for row in going]
        shares = _shares(own, logits[going, depth], [made[row] for row in going])
        still = []
        for place, (row, one) in enumerate(zip(going, own, strict=True)):
            wanted = shares[place]
            if depth < len(one.drafts):
                draft = one.drafts[depth]
                certain = torch.zeros_like(wanted)
                certain[draft] = 1.0
                guess = one.guesses[depth] if one.guesses else certain
                if one.uniform() * float(guess[draft]) < float(wanted[draft]):
                    made[row].append(draft)
                    still.append(row)
                    continue
                wanted = left_over(wanted[None], guess[None])[0]
            made[row] += drawn(wanted[None], [one.uniform()])
        going = still
        if not going:
            break
    return made


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
    from attrs import evolve

    chosen = sampling or Sampling()
    samplings = [evolve(chosen, seed=chosen.seed + row) for row in range(len(prompt))]
    total = prompt.shape[1] + count
    decoder = Decoder(model, total, speculate=speculate)
    decoder.admit(prompt.tolist(), samplings)
    rows = list(decoder.running)
    while decoder.running:
        decoder.keep([row for row, one in enumerate(decoder.running) if len(one.tokens) < total])
        decoder.step()
    made = [one.tokens[prompt.shape[1] : total] for one in rows]
    return torch.tensor(made, dtype=torch.int64, device=prompt.device).view(len(rows), count)


def sample(model: Model, tokenizer: Tokenizer, prompt: str, count: int, *, sampling: Sampling) -> str:
    """Return `prompt` and its continuation by `count` tokens, up to the end of the document."""
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt)]])
    made = generate(model, ids, count, sampling=sampling)[0].tolist()
    if tokenizer.eos in made:
        made = made[: made.index(tokenizer.eos)]
    return prompt + tokenizer.decode(made)

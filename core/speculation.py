"""Drafts: what a model's MTP modules guess of sequences under way, and which guesses are kept.

At the beginning of a round a sequence has T tokens, of which the trunk has seen T - 1. Module k has seen the positions
0 to T - 1 - k, for at position i it reads token i + k. In a round it goes on to T - 2 with what is drafted, and what
rests on drafts is forgotten again.
"""

from collections.abc import Sequence
from functools import partial

import torch
from attrs import define, field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tangram.core.contracts import Cache, Drafter
from tangram.core.model import Model
from tangram.core.recorded import Recorded
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

    @property
    def acceptance(self) -> list[float]:
        """For each depth, the share of the drafts offered that were kept."""
        return [kept / of if of else 0.0 for kept, of in zip(self.accepted, self.offered, strict=True)]

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a forward of the trunk gave a sequence."""
        return self.tokens / self.rounds if self.rounds else 0.0

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


class Drafts:
    """The MTP modules of a model, as they guess what comes next in sequences.

    Args:
        model: The model.

    Raises:
        ValueError: It has no such modules.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._drafter = model, drafter_of(model)
        self._device = next(model.parameters()).device
        self._recorded: dict[Cache, Recorded] = {}

    def goes_on(self, caches: Sequence[Cache]) -> None:
        """Take the caches of sequences that will be continued by drafts; none if that is not to be recorded."""
        self._recorded = {
            cache: Recorded(partial(self._by_module, k, cache), [cache]) for k, cache in enumerate(caches, 1)
        }

    def _by_module(self, k: int, cache: Cache, hidden: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor]:
        return (self._drafter.draft(k, hidden, tokens, positions, cache, self._model.shared),)

    @property
    def depth(self) -> int:
        """Tokens that are guessed for a sequence in a round."""
        return self._drafter.depth

    def new_caches(self, batch: int, length: int) -> list[Cache]:
        """Return an empty cache for each module."""
        return [self._drafter.new_cache(k + 1, batch, length) for k in range(self.depth)]

    def follow(self, sequences: Sequence[Running], trunk: Sequence[Tensor], caches: Sequence[Cache]) -> None:
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
        widths = [len(hidden) for hidden in inputs]
        if inputs and not any(widths):
            return list(inputs)
        read = [torch.tensor(own[:width], dtype=torch.int64) for own, width in zip(tokens, widths, strict=True)]
        size = max(widths, default=1)
        given = (
            pad_sequence(list(inputs), batch_first=True) if inputs else self._nothing(size),
            pad_sequence(read, batch_first=True).to(self._device) if read else self._nothing(size)[..., 0].long(),
            torch.tensor(starts, dtype=torch.int64, device=self._device)[:, None]
            + torch.arange(size, device=self._device),
        )
        recorded = self._recorded.get(cache)
        made = None if recorded is None else recorded.again(*given)
        (out,) = made or self._by_module(k, cache, *given)
        if min(widths, default=size) < size:
            cache.truncate(torch.tensor([start + width for start, width in zip(starts, widths, strict=True)]))
        return [out[row, :width] for row, width in enumerate(widths)]

    def draft(self, sequences: Sequence[Running], trunk: list[Tensor], caches: Sequence[Cache]) -> None:
        """Draft what comes next, given the trunk's residual stream [n, D] at the newest positions up to T - 2."""
        for one in sequences:
            one.drafts, one.guesses = [], []
        inputs = trunk
        for k, cache in enumerate(caches, start=1):
            starts = cache.lengths.tolist()
            tokens = [(one.tokens + one.drafts)[start + k :] for one, start in zip(sequences, starts, strict=True)]
            outs = self._through(k, inputs, tokens, starts, cache)
            seen = [max(len(one.tokens) - k, 0) for one in sequences]
            cache.truncate(torch.tensor(seen))
            if k < self.depth:
                inputs = self._with_carried(sequences, outs, k + 1)
                for one, start, out, n in zip(sequences, starts, outs, seen, strict=True):
                    if n > 0:
                        one.carried[k + 1] = out[n - 1 - start]
            if sequences:
                newest = torch.stack([out[-1:] for out in outs])
                self._guess(sequences, self._drafter.logits(k, newest, self._model.shared)[:, 0])

    def _nothing(self, size: int) -> Tensor:
        """Return hidden states [0, S, D], with which a rank without sequences takes part."""
        return torch.zeros(0, size, self._model.dim, dtype=self._model.compute, device=self._device)

    def _guess(self, sequences: Sequence[Running], logits: Tensor) -> None:
        """Draw the next draft of each sequence."""
        if all(one.sampling.plain for one in sequences):
            for one, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
                one.drafts.append(token)
            return
        shares = shares_of(sequences, logits, [one.drafts for one in sequences])
        tokens = drawn(shares, [one.uniform() for one in sequences])
        for one, token, guess in zip(sequences, tokens, shares, strict=True):
            one.drafts.append(token)
            one.guesses.append(guess)


def drafter_of(model: Model) -> Drafter:
    """Return what drafts tokens.

    Raises:
        ValueError: The model has nothing that does.
    """
    for _, objective in model.token_objectives():
        if isinstance(objective, Drafter):
            return objective
    raise ValueError("the model has no modules that draft tokens: train it with the objective mtp to speculate")


def agreed(drafts: Sequence[int], likeliest: Sequence[int]) -> list[int]:
    """Return the drafts up to the first that is not the likeliest token, and then the likeliest."""
    kept = next((i for i, draft in enumerate(drafts) if draft != likeliest[i]), len(drafts))
    return [*drafts[:kept], likeliest[kept]]


def shares_of(sequences: Sequence[Running], logits: Tensor, more: Sequence[Sequence[int]]) -> Tensor:
    """Return the probabilities [B, V] of each sequence's next token after its own and these."""
    seen = [[*one.tokens, *drafts] for one, drafts in zip(sequences, more, strict=True)]
    return distribution(logits, [one.sampling for one in sequences], seen)


def judged(sequences: Sequence[Running], logits: Tensor) -> list[list[int]]:
    """Return for each sequence the drafts that are kept, each with probability min(1, p / q), and one token more."""
    made: list[list[int]] = [[] for _ in sequences]
    going = list(range(len(sequences)))
    for depth in range(logits.shape[1]):
        own = [sequences[row] for row in going]
        shares = shares_of(own, logits[going, depth], [made[row] for row in going])
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

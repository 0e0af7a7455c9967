"""A needle in a haystack: a fact is hidden in a long text, and asked for at its end."""

import random
from collections.abc import Sequence
from itertools import cycle, islice

from attrs import frozen

from tangram.core.continuation import Request
from tangram.core.contracts import Data, Tokenizer
from tangram.core.records import Progress
from tangram.core.tokenizer_files import special_tokens
from tangram.plugins.evaluation.scoring import Scorer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLACES = ("kyoto", "lima", "oslo", "quito", "riga")
"""What the hidden facts are about, one fact each."""


@frozen
class Needle:
    """A fact to hide.

    Attributes:
        said: Tokens of the line that states it.
        asked: Tokens of the beginning of that line.
        answer: What the line goes on with.
        room: Tokens that an answer may have.
    """

    said: tuple[int, ...]
    asked: tuple[int, ...]
    answer: str
    room: int


def needle(place: str, tokenizer: Tokenizer) -> Needle:
    """Return the fact about a place: an assignment of five digits that depend on its name."""
    answer = str(random.Random(place).randrange(10_000, 100_000))
    left = f"\nmagic_number_of_{place} ="
    said, asked = tokenizer.encode(f"{left} {answer}\n"), tokenizer.encode(left)
    return Needle(tuple(said), tuple(asked), answer, len(tokenizer.encode(f" {answer}\n")) + 1)


def shortest(needles: Sequence[Needle]) -> int:
    """Return the tokens of the shortest context that has room for any of the facts, a question and an answer."""
    return 1 + max(len(one.said) + len(one.asked) + one.room for one in needles)


def haystack(data: Data, tokenizer: Tokenizer, count: int) -> tuple[list[int], str]:
    """Return `count` tokens of text, and whether it is held out; text that is trained on where nothing is.

    The ends of documents are left out, and text that is too short is repeated.
    """
    special = set(special_tokens(tokenizer))
    found: list[int] = []
    if data.held_out is not None:
        for batch, _ in data.held_out.batches(1):
            found += [token for token in batch.tokens[0].tolist() if token not in special]
            if len(found) >= count:
                break
    else:
        rows = data.batch(Progress(), max(1, -(-count // data.batch(Progress(), 1).tokens.shape[1]))).tokens
        found = [token for token in rows.flatten().tolist() if token not in special]
    return list(islice(cycle(found), count)), "training" if data.held_out is None else "held-out"


def hidden(one: Needle, hay: Sequence[int], length: int, depth: float, tokenizer: Tokenizer) -> Request:
    """Return the request whose prompt and answer have `length` tokens, with the fact at a depth from 0 to 1.

    It stands at the last end of a line before that depth, if there is one.
    """
    filler = list(hay[: length - 1 - len(one.said) - len(one.asked) - one.room])
    place = round(depth * len(filler))
    if depth < 1:
        ends = (at for at in range(place, 0, -1) if tokenizer.decode([filler[at - 1]]).endswith("\n"))
        place = next(ends, place)
    prompt = [tokenizer.bos, *filler[:place], *one.said, *filler[place:], *one.asked]
    return Request(prompt=tuple(prompt), tokens=one.room, stop=("\n",))


def grid(scorer: Scorer, data: Data, lengths: Sequence[int]) -> tuple[list[list[float]], str]:
    """Return the share of facts that the model repeats exactly, [depths][lengths], and where the text is from."""
    tokenizer = scorer.tokenizer
    needles = [needle(place, tokenizer) for place in PLACES]
    longest = max(lengths)
    hay, source = haystack(data, tokenizer, longest * len(needles))
    stretches = [hay[i * longest : (i + 1) * longest] for i in range(len(needles))]
    columns = []
    for length in lengths:
        requests = [
            hidden(one, stretch, length, depth, tokenizer)
            for depth in DEPTHS
            for one, stretch in zip(needles, stretches, strict=True)
        ]
        right = [
            text.strip() == one.answer for text, one in zip(scorer.continued(requests), cycle(needles), strict=False)
        ]
        found = [right[i : i + len(needles)] for i in range(0, len(right), len(needles))]
        columns.append([sum(row) / len(needles) for row in found])
    return [list(row) for row in zip(*columns, strict=True)], source

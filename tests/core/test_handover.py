"""A sequence that goes from one decoder to another goes on as if it had stayed."""

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import exact

from tangram.core import build_model
from tangram.core.decoding import Decoder
from tangram.core.model import Model
from tangram.core.sampling import Sampling

LENGTH = 40
DRAFTING = (("depth 0", False, 1), ("depth 1", True, 1), ("depth 2", True, 2))


@cache
def model(depth: int) -> Model:
    return build_model(exact(f"objectives.mtp.depth={depth}"), seed=1)


def prompts(sizes: Sequence[int], seed: int) -> list[list[int]]:
    stream = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 48, (size,), generator=stream).tolist() for size in sizes]


def sampling(seed: int, temperature: float) -> Sampling:
    return Sampling(temperature=temperature, repetition_penalty=1.0 if temperature == 0 else 1.2, seed=seed)


def until(decoder: Decoder, count: int) -> None:
    while any(len(one.tokens) < count for one in decoder.running):
        decoder.step()


@settings(max_examples=12)
@given(
    drafting=st.sampled_from(DRAFTING),
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    rounds=st.integers(0, 3),
    others=st.integers(0, 2),
    temperature=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 99),
)
def test_a_sequence_that_is_handed_over_goes_on_as_if_it_had_stayed(drafting, sizes, rounds, others, temperature, seed):
    _, speculate, depth = drafting
    texts, total = prompts(sizes, seed), max(sizes) + 7
    samplings = [sampling(seed + row, temperature) for row in range(len(texts))]
    stays, goes, gets = (Decoder(model(depth), LENGTH, speculate=speculate) for _ in range(3))
    if others:
        gets.admit(prompts([4] * others, seed + 1), [Sampling()] * others)
    for decoder in (stays, goes):
        decoder.admit(texts, samplings)
        for _ in range(rounds):
            decoder.step()
    row = seed % len(texts)
    wanted, moved = stays.running[row], goes.running[row]
    gets.take(goes.release(row))
    assert moved in gets.running and moved not in goes.running and len(goes.running) == len(texts) - 1
    for decoder in (stays, goes, gets):
        until(decoder, total)
    assert moved.tokens[:total] == wanted.tokens[:total]
    left = [one for one in stays.running if one is not wanted]
    assert [one.tokens[:total] for one in goes.running] == [one.tokens[:total] for one in left]


def test_greedy_sequences_that_drafted_alone_go_on_beside_others_that_draw():
    alone, joined = (Decoder(model(1), LENGTH, speculate=True) for _ in range(2))
    for decoder in (alone, joined):
        decoder.admit(prompts([5, 3], 2), [Sampling(), Sampling()])
    joined.admit(prompts([4], 3), [sampling(1, 1.0)])
    for decoder in (alone, joined):
        until(decoder, 20)
    for one, other in zip(alone.running, joined.running, strict=False):
        assert one.tokens[:20] == other.tokens[:20]


def test_what_is_handed_over_is_its_own_memory():
    goes, stays, gets = (Decoder(model(1), LENGTH, speculate=True) for _ in range(3))
    for decoder in (goes, stays):
        decoder.admit(prompts([5, 6], 3), [Sampling(), Sampling()])
    packet = goes.release(0)
    goes.admit(prompts([9], 4), [Sampling()])  # into the blocks that were let go
    until(goes, 20)
    gets.take(packet)
    for decoder in (stays, gets):
        until(decoder, 25)
    assert gets.running[0].tokens[:25] == stays.running[0].tokens[:25]


def test_a_text_that_is_begun_again_where_it_was_draws_what_it_would_have_drawn():
    how = sampling(7, 1.0)
    whole, broken, again = (Decoder(model(1), LENGTH) for _ in range(3))
    for decoder in (whole, broken):
        decoder.admit(prompts([5], 2), [how])
    until(whole, 20)
    until(broken, 11)
    one = broken.running[0]
    again.admit([one.tokens], [how], [one.draws])
    until(again, 20)
    assert again.running[0].tokens == whole.running[0].tokens


def test_a_sequence_is_not_taken_where_it_does_not_fit():
    plain, drafting, short = Decoder(model(1), LENGTH), Decoder(model(1), LENGTH, speculate=True), Decoder(model(1), 5)
    plain.admit(prompts([5], 2), [Sampling()])
    packet = plain.release(0)
    with pytest.raises(ValueError, match="only if both speculate"):
        drafting.take(packet)
    with pytest.raises(ValueError, match="at most 4 tokens; this has 6"):
        short.take(packet)
    assert not drafting.running and not short.running

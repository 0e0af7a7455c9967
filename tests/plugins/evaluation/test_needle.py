"""A fact is hidden once, where it is said to be, in a context of the length that is said; readers are told apart."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import run

from tangram.core import load_run
from tangram.core.continuation import Request
from tangram.core.contracts import Tokenizer
from tangram.core.step import Trainer
from tangram.core.tokenizer_files import special_tokens
from tangram.plugins.evaluation.needle import DEPTHS, PLACES, grid, haystack, hidden, needle, shortest


@pytest.fixture(scope="module")
def trained() -> Trainer:
    return load_run(run())


def tokenizer_of(trained: Trainer) -> Tokenizer:
    assert trained.data.tokenizer is not None
    return trained.data.tokenizer


class Reader:
    """Answers from the text, as far back as it sees."""

    def __init__(self, tokenizer: Tokenizer, sight: int) -> None:
        self.tokenizer, self.sight = tokenizer, sight

    def continued(self, requests: Sequence[Request]) -> list[str]:
        return [self._answer(self.tokenizer.decode(request.prompt[-self.sight :])) for request in requests]

    def _answer(self, text: str) -> str:
        asked = text.rpartition("\n")[2]
        return text.partition(f"\n{asked} ")[2].partition("\n")[0]


@settings(deadline=None)
@given(more=st.integers(0, 200), place=st.sampled_from(PLACES), depth=st.sampled_from(DEPTHS))
def test_a_fact_stands_once_in_a_context_of_its_length(trained: Trainer, more: int, place: str, depth: float) -> None:
    tokenizer = tokenizer_of(trained)
    one = needle(place, tokenizer)
    length = shortest([one]) + more
    hay, _ = haystack(trained.data, tokenizer, 500)
    request = hidden(one, hay, length, depth, tokenizer)
    assert len(request.prompt) + request.tokens == length
    assert request.prompt[0] == tokenizer.bos
    text = tokenizer.decode(request.prompt)
    assert text.count(one.answer) == 1
    assert text.endswith(f"\nmagic_number_of_{place} =")
    filler = tokenizer.decode(hay[: round(depth * more)])
    lines_end = filler.rfind("\n") + 1
    assert text.partition("\nmagic_number_of")[0] == (filler[:lines_end] if lines_end and depth < 1 else filler)


def test_who_sees_all_repeats_all_and_who_sees_the_end_repeats_what_is_there(trained: Trainer) -> None:
    tokenizer = tokenizer_of(trained)
    lengths = [200, 400]
    everything, source = grid(Reader(tokenizer, 10_000), trained.data, lengths)  # type: ignore[arg-type]
    assert source == "held-out"
    assert everything == [[1.0, 1.0]] * len(DEPTHS)
    half, _ = grid(Reader(tokenizer, 200), trained.data, lengths)  # type: ignore[arg-type]
    assert [row[0] for row in half] == [1.0] * len(DEPTHS)
    assert [row[1] for row in half] == [0.0, 0.0, 0.0, 1.0, 1.0]
    blind, _ = grid(Reader(tokenizer, 30), trained.data, lengths)  # type: ignore[arg-type]
    assert blind == [[0.0, 0.0]] * len(DEPTHS)


def test_facts_differ_and_are_the_same_every_time(trained: Trainer) -> None:
    tokenizer = tokenizer_of(trained)
    answers = [needle(place, tokenizer).answer for place in PLACES]
    assert len({*answers}) == len(PLACES)
    assert answers == [needle(place, tokenizer).answer for place in PLACES]


@pytest.mark.parametrize("count", [10, 10_000])
def test_the_hay_is_held_out_text_without_ends_and_of_any_length(trained: Trainer, count: int) -> None:
    tokenizer = tokenizer_of(trained)
    hay, source = haystack(trained.data, tokenizer, count)
    assert (len(hay), source) == (count, "held-out")
    assert not set(hay) & set(special_tokens(tokenizer))


class WithoutHeldOut:
    def __init__(self, trained: Trainer) -> None:
        self.held_out, self.batch = None, trained.data.batch


def test_where_nothing_is_held_out_the_hay_is_what_was_trained_on_and_says_so(trained: Trainer) -> None:
    tokenizer = tokenizer_of(trained)
    hay, source = haystack(WithoutHeldOut(trained), tokenizer, 100)  # type: ignore[arg-type]
    assert (len(hay), source) == (100, "training")
    assert not set(hay) & set(special_tokens(tokenizer))

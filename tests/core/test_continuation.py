"""Texts that come in tokens: what is said is certain, stops are heeded, and many share a decoder."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import exact

from tangram.core import build_model
from tangram.core.continuation import Continuation, Request, continue_all
from tangram.core.decoding import Decoder
from tangram.core.sampling import Sampling

TEXTS = st.text(alphabet="abé世🙂 \n", max_size=12)


class Bytes:
    """A token for each byte; token 256 ends a text and token 257 begins it."""

    bos, eos = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def to_json(self) -> str:
        return ""


def said(text: Continuation, tokens: list[int], cuts: list[int]) -> list[str]:
    """Return what a text says when its tokens come in pieces."""
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    return [text.take(tokens[a:b]) for a, b in pairwise(edges)]


@given(text=TEXTS, cuts=st.lists(st.integers(0, 40), max_size=6))
def test_pieces_are_whole_characters_and_make_up_the_text(text: str, cuts: list[int]) -> None:
    tokens = Bytes().encode(text)
    one = Continuation(Request(prompt=(257,), tokens=len(tokens) + 1), Bytes())
    pieces = said(one, [*tokens, Bytes.eos, 65], cuts)
    assert "".join(pieces) == text
    assert one.reason == "stop"
    assert one.made == tokens


@given(
    text=TEXTS, stops=st.lists(st.text(alphabet="ab世", min_size=1, max_size=3), min_size=1, max_size=2), data=st.data()
)
def test_a_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    tokens = Bytes().encode(text)
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=6))
    one = Continuation(Request(prompt=(257,), tokens=len(tokens) + 1, stop=tuple(stops)), Bytes())
    pieces = said(one, [*tokens, Bytes.eos], cuts)
    # The first to be whole ends the text; of several that end at one place, the one that began first.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = text
    if ends:
        expected = text[: min(text.find(stop) for stop in stops if stop in text[: min(ends)])]
    assert "".join(pieces) == expected


@given(text=st.text(alphabet="aé世", min_size=1, max_size=6), left_out=st.integers(0, 3))
def test_the_last_token_ends_a_text_even_within_a_character(text: str, left_out: int) -> None:
    tokens = Bytes().encode(text)
    kept = tokens[: max(len(tokens) - left_out, 1)]
    one = Continuation(Request(prompt=(257,), tokens=len(kept)), Bytes())
    assert one.take(tokens) == Bytes().decode(kept)
    assert one.reason == "length"


def test_a_stop_string_is_not_empty() -> None:
    with pytest.raises(ValueError, match="a stop string is not empty"):
        Request(prompt=(257,), tokens=1, stop=("",))


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("together", [1, 2, 5])
def test_many_texts_through_one_decoder_are_each_as_if_alone(together: int, speculate: bool) -> None:
    model = build_model(exact("model.vocab_size=258"), seed=1)
    stream = torch.Generator().manual_seed(0)
    requests = [
        Request(
            prompt=tuple(torch.randint(256, (size,), generator=stream).tolist()),
            tokens=tokens,
            sampling=Sampling(temperature=float(number % 2), seed=number),
        )
        for number, (size, tokens) in enumerate([(3, 5), (1, 9), (6, 1), (2, 7), (4, 4)])
    ]

    def texts(asked: list[Request], at_once: int) -> list[str]:
        found = [""] * len(asked)
        for number, text, _, _ in continue_all(
            Decoder(model, 20, speculate=speculate), Bytes(), asked, together=at_once
        ):
            found[number] += text
        return found

    alone = [texts([request], 1)[0] for request in requests]
    assert texts(requests, together) == alone

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import exact

from tangram.core import build_model
from tangram.core.decoding import generate, sample
from tangram.core.model import Model

ATTENTIONS = ((), ("model.block.attention={use: gqa, n_heads: 2, head_dim: 6}",))


@pytest.fixture(scope="module", params=ATTENTIONS, ids=["mla", "gqa"])
def model(request: pytest.FixtureRequest) -> Model:
    return build_model(exact(*request.param), seed=1)


@settings(max_examples=10)
@given(batch=st.integers(1, 3), length=st.integers(1, 6), count=st.integers(1, 6), seed=st.integers(0, 99))
def test_greedy_tokens_are_the_likeliest_of_a_forward_without_cache(
    model: Model, batch: int, length: int, count: int, seed: int
) -> None:
    prompt = torch.randint(48, (batch, length), generator=torch.Generator().manual_seed(seed))
    made = generate(model, prompt, count)
    text = torch.cat([prompt, made], 1)
    logits = model.logits(text[:, :-1])[:, length - 1 :]
    assert made.shape == (batch, count)
    assert torch.equal(made, logits.argmax(-1))


def test_a_seed_decides_the_draws_and_the_temperature_their_spread(model: Model) -> None:
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    one, same, other = (generate(model, prompt, 12, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(generate(model, prompt, 12, temperature=1e-6, seed=3), generate(model, prompt, 12))


class Letters:
    """A token for each letter; token 0 ends a text and token 1 begins it."""

    bos, eos = 1, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 95 for letter in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(95 + i) for i in ids)


def test_a_sample_continues_the_prompt_up_to_the_end_of_the_document(model: Model) -> None:
    text = sample(model, Letters(), "abc", 8, temperature=0.0, seed=0)
    assert text.startswith("abc")
    ids = generate(model, torch.tensor([[1, 2, 3, 4]]), 8)[0].tolist()
    assert text[3:] == Letters().decode(ids[: ids.index(0)] if 0 in ids else ids)

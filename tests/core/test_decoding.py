import itertools
from collections.abc import Iterable, Sequence

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny import exact
from torch import Tensor

from tangram.core import build_model
from tangram.core.decoding import Decoder, generate, sample
from tangram.core.model import Model
from tangram.core.records import Batch, Progress
from tangram.core.sampling import Sampling
from tangram.core.speculation import drafter_of

ATTENTIONS = ((), ("model.block.attention={use: gqa, n_heads: 2, head_dim: 6}",))
DEPTHS = (1, 2, 3)
FEW = 5
"""Tokens of a vocabulary so small that drafts are often right by chance."""


@pytest.fixture(scope="module", params=ATTENTIONS, ids=["mla", "gqa"])
def model(request: pytest.FixtureRequest) -> Model:
    return build_model(exact(*request.param), seed=1)


def drafts(depth: int) -> Model:
    """Return a model that drafts, with as large weights as make its guesses differ from place to place."""
    model = build_model(exact(f"model.vocab_size={FEW}", f"objectives.mtp.depth={depth}"), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module", params=DEPTHS)
def drafting(request: pytest.FixtureRequest) -> Model:
    return drafts(request.param)


def prompts_of(sizes: Sequence[int], vocabulary: int, seed: int) -> list[list[int]]:
    stream = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (size,), generator=stream).tolist() for size in sizes]


def continued_alone(model: Model, prompt: list[int], count: int) -> list[int]:
    """Return the likeliest continuation, by a forward over everything for each token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


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


@settings(max_examples=8)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    more=st.lists(st.integers(1, 9), max_size=2),
    chunk=st.integers(1, 5),
    rounds=st.integers(0, 3),
    speculate=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sequences_come_and_go_and_each_is_continued_as_if_alone(
    drafting: Model, sizes: list[int], more: list[int], chunk: int, rounds: int, speculate: bool, seed: int
) -> None:
    count, prompts = 7, prompts_of([*sizes, *more], FEW, seed)
    decoder = Decoder(drafting, 40, speculate=speculate, chunk=chunk)
    decoder.admit(prompts[: len(sizes)], [Sampling()] * len(sizes))
    for _ in range(rounds):
        decoder.step()
    if more:
        decoder.admit(prompts[len(sizes) :], [Sampling()] * len(more))
    everyone = list(decoder.running)
    ends = {id(one): len(prompt) + count for one, prompt in zip(everyone, prompts, strict=True)}
    while decoder.running:
        decoder.step()
        decoder.keep([row for row, one in enumerate(decoder.running) if len(one.tokens) < ends[id(one)]])
    for one, prompt in zip(everyone, prompts, strict=True):
        assert one.tokens[: len(prompt)] == prompt
        assert one.tokens[len(prompt) :][:count] == continued_alone(drafting, prompt, count)


def drafts_by_training(model: Model, tokens: list[int]) -> list[int]:
    """Return what the modules say of a sequence in the forward that training takes, each fed the one before's draft."""
    drafter, shared = drafter_of(model), model.shared
    known, drafts = len(tokens), list[int]()
    row = torch.tensor([tokens[:-1]])
    positions = torch.arange(known - 1)[None]
    hidden = model(Batch(row, None, positions, torch.zeros_like(row), 0, 1), Progress()).trunk
    for k in range(1, drafter.depth + 1):
        ahead = torch.tensor([[*tokens, *drafts][k : k + known - 1]])
        cache = drafter.new_cache(k, 1, known)
        hidden = drafter.draft(k, hidden, ahead, positions, cache, shared)
        drafts.append(int(drafter.logits(k, hidden[:, -1:], shared).argmax()))
    return drafts


@settings(max_examples=8)
@given(size=st.integers(1, 6), rounds=st.integers(0, 5), chunk=st.integers(1, 4), seed=st.integers(0, 99))
@torch.no_grad()
def test_the_drafts_are_what_the_modules_say_of_the_whole_sequence(
    drafting: Model, size: int, rounds: int, chunk: int, seed: int
) -> None:
    decoder = Decoder(drafting, 40, speculate=True, chunk=chunk)
    decoder.admit(prompts_of([size], FEW, seed), [Sampling()])
    for _ in range(rounds):
        decoder.step()
    assert decoder.running[0].drafts == drafts_by_training(drafting, decoder.running[0].tokens)


def test_right_drafts_are_kept_and_counted(drafting: Model) -> None:
    prompts = prompts_of([4] * 20, FEW, 0)
    decoder = Decoder(drafting, 64, speculate=True)
    decoder.admit(prompts, [Sampling()] * 20)
    for _ in range(12):
        decoder.step()
    tally = decoder.tally
    assert tally.rounds == 20 * 13  # the prompt's forward gives a token too
    assert tally.tokens == sum(len(one.tokens) - 4 for one in decoder.running)
    assert tally.tokens - tally.rounds == sum(tally.accepted) > 0
    assert tally.offered[0] == 20 * 12
    assert tally.offered[1:] == tally.accepted[:-1]


def shares_of(model: Model, prompt: list[int], sampling: Sampling, count: int) -> Tensor:
    """Return the probability of every continuation by `count` tokens, [FEW ** count], by plain forwards."""
    every = list(itertools.product(range(FEW), repeat=count))
    with torch.no_grad():
        logits = model.logits(torch.tensor([[*prompt, *each[:-1]] for each in every]))[:, len(prompt) - 1 :]
    shares = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_k:
        least = shares.topk(sampling.top_k).values[..., -1:]
        shares = shares.masked_fill(shares < least, 0)
        shares /= shares.sum(-1, keepdim=True)
    return shares.gather(2, torch.tensor(every)[..., None])[..., 0].prod(-1)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=3)])
def test_what_is_kept_of_drafts_is_distributed_as_without_them(sampling: Sampling) -> None:
    prompt, count, runs, drafting = [1, 2, 0], 3, 1500, drafts(2)
    expected = shares_of(drafting, prompt, sampling, count)
    for speculate in (False, True):
        decoder = Decoder(drafting, len(prompt) + count + 4, speculate=speculate)
        decoder.admit([prompt] * runs, [evolve(sampling, seed=seed) for seed in range(runs)])
        for _ in range(count - 1):
            decoder.step()
        places = torch.tensor([one.tokens[len(prompt) :][:count] for one in decoder.running])
        counts = torch.bincount(places @ torch.tensor([FEW**2, FEW, 1]), minlength=FEW**count)
        assert not counts[expected == 0].any()
        likely = expected * runs >= 5  # below, the test is not one
        seen = torch.cat([counts[likely], counts[~likely].sum()[None]]).double()
        due = torch.cat([expected[likely], expected[~likely].sum()[None]]) * runs
        fair = due > 0
        assert chisquare(seen[fair].numpy(), due[fair].numpy() * float(seen.sum() / due.sum())).pvalue > 1e-3


def test_a_seed_decides_the_draws_and_the_temperature_their_spread(model: Model) -> None:
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    warm, cold = Sampling(temperature=1.0, seed=1), Sampling(temperature=1e-6, seed=3)
    one, same, other = (generate(model, prompt, 12, sampling=evolve(warm, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(generate(model, prompt, 12, sampling=cold), generate(model, prompt, 12))


def test_a_sequence_is_drawn_the_same_whoever_is_drawn_for_beside_it(model: Model) -> None:
    prompts, warm = prompts_of([3, 5, 2], 48, 0), Sampling(temperature=1.0)
    samplings = [evolve(warm, seed=seed) for seed in (7, 8, 9)]
    together = Decoder(model, 20)
    together.admit(prompts, samplings)
    alone = Decoder(model, 20)
    alone.admit(prompts[1:2], samplings[1:2])
    for _ in range(9):
        together.step()
        alone.step()
    assert together.running[1].tokens == alone.running[0].tokens


def test_cache_bytes_are_those_of_the_formula(model: Model) -> None:
    decoder = Decoder(model, 20)
    decoder.admit(prompts_of([3, 7], 48, 0), [Sampling()] * 2)
    decoder.step()
    widths = [block.attention.cache_width for _, block in model.trunk()]
    assert decoder.cache_bytes == (4 + 8) * sum(widths) * torch.float64.itemsize


def test_what_cannot_be_continued_is_refused(model: Model) -> None:
    decoder = Decoder(model, 5)
    for prompt in ([], [1] * 5):
        with pytest.raises(ValueError, match="a prompt has 1 to 4 tokens"):
            decoder.admit([prompt], [Sampling()])
    with pytest.raises(ValueError, match="train it with the objective mtp"):
        Decoder(build_model(exact("objectives.mtp=null"), seed=1), 5, speculate=True)


class Letters:
    """A token for each letter; token 0 ends a text and token 1 begins it."""

    bos, eos = 1, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 95 for letter in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(95 + i) for i in ids)


def test_a_sample_continues_the_prompt_up_to_the_end_of_the_document(model: Model) -> None:
    text = sample(model, Letters(), "abc", 8, sampling=Sampling())
    assert text.startswith("abc")
    ids = generate(model, torch.tensor([[1, 2, 3, 4]]), 8)[0].tolist()
    assert text[3:] == Letters().decode(ids[: ids.index(0)] if 0 in ids else ids)

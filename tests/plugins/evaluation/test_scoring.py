"""What a model thinks of a text is what a plain forward says of it, however texts are batched; and texts end."""

import warnings
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from released import fill
from scored import LENGTH, run

from tangram.core import load_run
from tangram.core.decoding import generate
from tangram.core.sampling import Sampling
from tangram.core.step import Trainer
from tangram.plugins.evaluation.scoring import Scorer, spans
from tangram.testing import tolerance

BOUND = 256 * tolerance(torch.float64, LENGTH)
"""Relative to a sum of at most LENGTH log-probabilities, each behind three blocks of products as long as the model is
wide; norms and gates let rounding grow, by less than this."""

TEXT = st.text("abc 1é世\n", max_size=40)


@pytest.fixture(scope="module")
def trained() -> Trainer:
    trained = load_run(run())
    fill(trained.model)  # so that texts differ from each other
    return trained


def scorer_of(trained: Trainer, at_once: int = 4096, length: int = LENGTH) -> Scorer:
    assert trained.data.tokenizer is not None
    return Scorer(trained.model, trained.data.tokenizer, length, at_once=at_once)


def by_hand(trained: Trainer, tokens: Sequence[int], first: int) -> tuple[float, bool]:
    """Return log-probability and greediness of the tokens from `first` on, by one forward of this text alone."""
    with torch.no_grad():
        logits = trained.model.logits(torch.tensor([tokens[:-1]]))[0]
    wanted = torch.tensor(tokens[1:])
    each = logits.log_softmax(-1)[torch.arange(len(wanted)), wanted][first - 1 :]
    return float(each.sum()), bool((logits.argmax(-1) == wanted)[first - 1 :].all())


@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(
        st.tuples(st.lists(st.integers(9, 200), min_size=2, max_size=LENGTH), st.integers(1, 9)), max_size=6
    ),
    at_once=st.sampled_from((1, 40, 4096)),
)
def test_a_score_is_that_of_a_forward_of_the_text_alone(
    trained: Trainer, texts: list[tuple[list[int], int]], at_once: int
) -> None:
    texts = [(tokens, min(first, len(tokens) - 1)) for tokens, first in texts]
    for (tokens, first), found in zip(texts, scorer_of(trained, at_once).scores(texts), strict=True):
        logprob, greedy = by_hand(trained, tokens, first)
        assert found.logprob == pytest.approx(logprob, rel=BOUND)
        assert found.greedy == greedy


@settings(max_examples=10, deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_a_continuation_is_scored_on_the_tokens_of_the_whole_text(
    trained: Trainer, pairs: list[tuple[str, str]]
) -> None:
    scorer = scorer_of(trained)
    encode, bos = scorer.tokenizer.encode, scorer.tokenizer.bos
    for (context, continuation), found in zip(pairs, scorer.continuations(pairs), strict=True):
        whole, before = [bos, *encode(context + continuation)], [bos, *encode(context.rstrip())]
        first = next((i for i in range(1, len(whole)) if whole[: i + 1] != before[: i + 1]), len(whole))
        expected = by_hand(trained, whole, first) if first < len(whole) else (0.0, True)
        assert found.logprob == pytest.approx(expected[0], rel=BOUND)
        assert found.greedy == expected[1]


def test_the_likeliest_continuation_is_known_from_any_other(trained: Trainer) -> None:
    prompt = [0, *range(70, 80)]
    likeliest = generate(trained.model, torch.tensor([prompt]), 6)[0].tolist()
    for changed in range(-1, 6):
        made = [token + (i == changed) for i, token in enumerate(likeliest)]
        (found,) = scorer_of(trained).scores([([*prompt, *made], len(prompt))])
        assert found.greedy == (changed < 0)


def test_a_text_of_several_windows_is_the_likeliest_only_if_all_of_it_is(trained: Trainer) -> None:
    tokens = [70]
    for _ in range(3):
        tokens += generate(trained.model, torch.tensor([tokens[-1:]]), 3)[0].tolist()
    scorer = scorer_of(trained, length=3)
    changed = [[token + (i == at) for i, token in enumerate(tokens)] for at in range(1, len(tokens))]
    found = scorer.scores([(text, 1) for text in (tokens, *changed)])
    assert [each.greedy for each in found] == [True] + [False] * len(changed)


def test_a_batch_is_no_larger_than_allowed_unless_it_is_one_text(trained: Trainer) -> None:
    shapes: list[torch.Size] = []
    hook = trained.model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].tokens.shape))
    texts = [(list(range(50, 50 + size)), 1) for size in (9, 3, 30, 4, 25, 5, 3, 2, 28, 6)]
    scorer_of(trained, at_once=24).scores(texts)
    hook.remove()
    assert sum(rows for rows, _ in shapes) == len(texts)
    assert all(rows == 1 or rows * width <= 24 for rows, width in shapes)
    assert max(rows for rows, _ in shapes) > 1


@given(total=st.integers(1, 60), first=st.integers(1, 20), length=st.integers(1, 20))
def test_windows_score_every_token_once_with_as_much_before_it_as_is_read_at_once(
    total: int, first: int, length: int
) -> None:
    windows = list(spans(total, first, length))
    assert [at for _, begin, end in windows for at in range(begin, end)] == list(range(first, total))
    for start, begin, end in windows:
        assert start < begin
        assert end - 1 - start == min(length, end - 1)
    assert len(windows) == -(-max(0, total - first) // length)


@settings(max_examples=10, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=3), length=st.integers(4, 30))
def test_rolling_is_the_sum_over_all_tokens_of_a_text(trained: Trainer, texts: list[str], length: int) -> None:
    scorer = scorer_of(trained, length=length)
    for text, found in zip(texts, scorer.rolling(texts), strict=True):
        tokens = [scorer.tokenizer.bos, *scorer.tokenizer.encode(text)]
        expected = sum(
            by_hand(trained, tokens[start:end], begin - start)[0] for start, begin, end in spans(len(tokens), 1, length)
        )
        assert found == pytest.approx(expected, rel=BOUND)
        if len(tokens) - 1 <= length and len(tokens) > 1:
            assert found == pytest.approx(by_hand(trained, tokens, 1)[0], rel=BOUND)


def test_of_a_text_that_is_too_long_the_beginning_is_left_out_with_a_remark(trained: Trainer) -> None:
    scorer = scorer_of(trained, length=8)
    context, continuation = "abc abc 1é世 " * 9, "abc"
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than the 8 tokens"):
        found, _ = scorer.continuations([(context, continuation), ("a", "b")])
    tokens = scorer.tokenizer.encode(context + continuation)
    size = len(tokens) - len(scorer.tokenizer.encode(context.rstrip()))
    assert found.logprob == pytest.approx(by_hand(trained, tokens[-9:], 9 - size)[0], rel=BOUND)


def test_a_text_ends_before_a_stop_string_and_else_has_all_its_tokens(trained: Trainer) -> None:
    scorer = scorer_of(trained)
    plain = scorer.asked("abc", 30, [], Sampling())
    (whole,) = scorer.continued([plain])
    expected = generate(trained.model, torch.tensor([plain.prompt]), 30)[0].tolist()
    assert whole == scorer.tokenizer.decode(expected)
    stop = whole[len(whole) // 2 :][:3]
    requests = [scorer.asked("abc", 30, stops, Sampling()) for stops in (["\0 never"], [stop], [stop, whole[:1]])]
    assert scorer.continued(requests) == [whole, whole[: whole.index(stop)], ""]
    assert scorer.continued([]) == []


@settings(deadline=None)
@given(size=st.integers(0, 3 * LENGTH), tokens=st.integers(1, 2 * LENGTH))
def test_a_request_fits_and_loses_no_more_than_it_must(trained: Trainer, size: int, tokens: int) -> None:
    scorer = scorer_of(trained)
    prompt = "世" * size
    whole = [scorer.tokenizer.bos, *scorer.tokenizer.encode(prompt)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        request = scorer.asked(prompt, tokens, ["x"], Sampling())
    fits = len(whole) + tokens <= LENGTH
    assert list(request.prompt) == whole[len(whole) - len(request.prompt) :]
    assert len(request.prompt) + request.tokens <= LENGTH
    assert request.tokens >= min(tokens, LENGTH // 2)
    assert bool(told) != fits
    if fits:
        assert (len(request.prompt), request.tokens) == (len(whole), tokens)
    else:
        assert len(request.prompt) + request.tokens == LENGTH

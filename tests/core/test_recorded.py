"""A round that is run from a recording is the round that the model would have run, bit for bit."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from tangram.core import build_model, recorded
from tangram.core.contracts import Cache
from tangram.core.decoding import Decoder
from tangram.core.model import Model
from tangram.core.recorded import Recorded
from tangram.core.sampling import Sampling
from tangram.kernels import use
from tangram.kernels.compiled import compiler
from tangram.plugins.attention.cache import BLOCK

GQA = "model.block.attention={use: gqa, n_heads: 2, head_dim: 6}"


@pytest.fixture(autouse=True)
def _as_by_default() -> Iterator[None]:
    """Choose as a user does who says nothing."""
    with use("auto"):
        yield


compiled = pytest.mark.skipif(compiler() is None, reason="without a C++ compiler attention looks at the lengths")


@pytest.fixture(scope="module")
def model() -> Model:
    return build_model(tiny("precision.compute=float32"), seed=1)


def rounds(decoder: Decoder, sizes: list[int], seed: int) -> list[list[int]]:
    """Return what sequences become when one leaves after some rounds and another comes."""
    stream = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(48, (size,), generator=stream).tolist() for size in sizes]
    decoder.admit(prompts[:-1], [Sampling(temperature=0.7, seed=n) for n in range(len(prompts) - 1)])
    everyone = list(decoder.running)
    for _ in range(7):
        decoder.step()
    decoder.keep(range(1, len(decoder.running)))
    decoder.admit(prompts[-1:], [Sampling()])
    everyone += decoder.running[-1:]
    for _ in range(6):
        decoder.step()
    return [one.tokens for one in everyone]


@settings(max_examples=6)
@given(
    sizes=st.lists(st.sampled_from([1, 5, BLOCK - 4, BLOCK + 1]), min_size=2, max_size=4),
    speculate=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_same_texts(model: Model, sizes: list[int], speculate: bool, seed: int) -> None:
    texts = []
    for alike in (recorded._ALIKE, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recorded, "_ALIKE", alike)
            texts.append(rounds(Decoder(model, 2 * BLOCK, speculate=speculate), sizes, seed))
    assert texts[0] == texts[1]


def continued(model: Model) -> tuple[Callable[[torch.Tensor, torch.Tensor, Cache], tuple[torch.Tensor]], int]:
    """Return the first layer's attention as a function, and its width."""
    attention = next(model.trunk())[1].attention

    def fn(x: torch.Tensor, positions: torch.Tensor, cache: Cache) -> tuple[torch.Tensor]:
        return (attention(x, positions, torch.zeros_like(positions), cache),)

    return fn, model.dim


@compiled
@torch.inference_mode()
def test_memory_that_moves_is_noticed(model: Model) -> None:
    fn, width = continued(model)
    attention = next(model.trunk())[1].attention
    cache, plain = (attention.new_cache(1, 2 * BLOCK) for _ in range(2))
    appended = Recorded(lambda x, positions: fn(x, positions, cache), [cache])
    stream = torch.Generator().manual_seed(0)
    others, done, before = [], 0, torch.zeros(0)
    for step in range(40):
        x = torch.randn(1, 1, width, generator=stream, dtype=model.compute)
        positions = torch.full((1, 1), step)
        copy = before.clone()
        again = appended.again(x, positions)
        assert torch.equal(before, copy), "what a call gave stays"
        done += again is not None
        (out,) = again or fn(x, positions, cache)
        assert torch.equal(out, fn(x, positions, plain)[0])
        before = out
        if step in (10, 20):  # forks write too, so that the pool must grow
            others += [cache.fork(torch.tensor([0])) for _ in range(3)]
            for other in others:
                fn(x, positions + 1, other)
    assert 20 < done < 36
    assert cache.lengths.tolist() == plain.lengths.tolist() == [40]
    assert torch.equal(cache.kept(0), plain.kept(0))


@compiled
@pytest.mark.parametrize(("override", "happens"), [((), True), ((GQA,), False)], ids=["mla", "gqa"])
def test_only_what_is_steady_is_recorded(override: tuple[str, ...], happens: bool) -> None:
    decoder = Decoder(build_model(tiny("precision.compute=float32", *override), seed=1), 20)
    decoder.admit([[1, 2, 3]], [Sampling()])
    for _ in range(8):
        decoder.step()
    assert bool(decoder._recorded._calls) == happens


def test_a_forward_that_looks_at_values_goes_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tiny("precision.compute=float32"), seed=1)
    looks = []
    head = model.head
    assert head is not None
    forward = head.forward

    def peeking(x: torch.Tensor) -> torch.Tensor:
        looks.append(float(x.sum()))
        return forward(x)

    wanted = Decoder(model, 20)
    wanted.admit([[1, 2, 3]], [Sampling()])
    texts = [wanted.step() for _ in range(8)]
    monkeypatch.setattr(head, "forward", peeking)
    decoder = Decoder(model, 20)
    decoder.admit([[1, 2, 3]], [Sampling()])
    assert [decoder.step() for _ in range(8)] == texts
    assert len(looks) == 9
    assert not decoder._recorded._calls

"""AdamW on its two paths, against torch's own, and what rounding does to moments that are kept in bfloat16."""

import pytest
import torch
from torch import Tensor
from twins import guarded, numbers, on_both, same_bits, strided

from tangram import kernels
from tangram.kernels import adamw_step
from tangram.kernels.adamw import _random_bits, _rounded
from tangram.testing import assert_close

F32, BF16 = torch.float32, torch.bfloat16
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(70, 30), (2, 3, 5), (1024,), (1,), (0, 4)]


def drawn(shape: tuple[int, ...], kept: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Return a weight, its gradient and its two moments, as after some steps."""
    w, grad, m, v = (numbers(*shape, seed=4 * seed + i, decades=2) for i in range(4))
    return [w, grad, (0.1 * m).to(kept), v.square().to(kept)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def take(tensors: list[list[Tensor]], step: int = 3, **settings) -> list[Tensor]:
    """Step weights, each given with its gradient and moments, and return what is written, one after the other."""
    adamw_step(*(list(kind) for kind in zip(*tensors, strict=True)), step=step, **SETTINGS | settings)
    return [t for w, _, m, v in tensors for t in (w, m, v)]


@pytest.mark.parametrize("kept", [F32, BF16])
@pytest.mark.parametrize("held", [guarded, strided])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_kernel_agrees_with_the_twin(kept, held, decay):
    every = [drawn(shape, kept, seed) for seed, shape in enumerate(SHAPES)]
    start = [t.clone() for w, _, m, v in every for t in (w, m, v)]

    def run() -> list[Tensor]:
        return take([[held(t) for t in each] for each in every], weight_decay=decay)

    twin, kernel = on_both(run)
    for one, other, before in zip(kernel, twin, start, strict=True):
        assert one.dtype is other.dtype is before.dtype
        # A dozen operations, none of which cancels; a moment is rounded to its own dtype at the end.
        assert_close(one, other, length=1 if one.dtype is BF16 else 12)
        assert one.numel() == 0 or not torch.equal(one.cpu(), before)


@pytest.mark.parametrize("kept", [F32, BF16])
@pytest.mark.parametrize("path", ["reference", "triton"])
def test_nothing_but_the_arguments_is_written_and_any_strides_are_taken(kept, path):
    plain = drawn((6, 5), kept)
    with kernels.use(path):
        expected = take([[t.clone() for t in plain]])
        for change in (lambda t: t.t().contiguous().t(), lambda t: strided(t).cpu()):
            one = [change(t) for t in plain]
            got = take([one])
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
            assert same_bits(one[1], plain[1])
            mixed = [plain[0].clone(), change(plain[1]), plain[2].clone(), plain[3].clone()]
            assert all(same_bits(a, b) for a, b in zip(take([mixed]), expected, strict=True))
        wide = torch.full((3, 6, 5), float("nan"))
        wide[1] = plain[0]
        take([[wide[1], *plain[1:2], *(t.clone() for t in plain[2:])]])
        assert wide[[0, 2]].isnan().all() and not wide[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, F32])
def test_with_moments_in_the_dtype_of_the_weights_it_is_torchs_to_the_last_bit(dtype):
    w = numbers(40, 7, seed=1).to(dtype)
    theirs = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 6):
        theirs.grad = numbers(40, 7, seed=10 + step).to(dtype)
        optimizer.step()
        with kernels.use("reference"):
            take([[w, theirs.grad, m, v]], step)
    state = optimizer.state[theirs]
    for one, other in ((w, theirs.detach()), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        assert same_bits(one, other)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_with_bfloat16_moments_it_is_torchs_but_for_their_rounding_at_the_end(path):
    w, grad, m, v = drawn((40, 7), BF16)
    theirs = torch.nn.Parameter(w.clone())
    theirs.grad = grad
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer.state[theirs] = {"step": torch.tensor(2.0), "exp_avg": m.float(), "exp_avg_sq": v.float()}
    optimizer.step()
    with kernels.use(path):
        ours = take([[w, grad, m, v]], 3)
    state = optimizer.state[theirs]
    assert_close(ours[0], theirs.detach(), length=12)
    for moment, wide in zip(ours[1:], (state["exp_avg"], state["exp_avg_sq"]), strict=True):
        # Half a unit of eight bits; the numbers before rounding differ by a few units of 24.
        assert ((moment.float() - wide).abs() <= wide.abs() * (2**-8 + 2**-20)).all()


def test_both_paths_round_with_the_same_bits():
    every = [[w, grad, torch.zeros_like(m), torch.zeros_like(v)] for w, grad, m, v in (drawn((70, 30), BF16),)]
    # From moments of zero with rates of a half, what is rounded is the same number on both.
    runs = [
        on_both(lambda s=seed: take([[t.clone() for t in every[0]]], betas=(0.5, 0.5), stochastic=generator(s)))
        for seed in (1, 2)
    ]
    for twin, kernel in runs:
        assert same_bits(twin[1], kernel[1])
        assert same_bits(twin[2], kernel[2])
    assert not same_bits(runs[0][0][1], runs[1][0][1])
    assert not same_bits(runs[0][0][2], runs[1][0][2])


def test_every_weight_is_rounded_on_its_own_and_alike_from_the_same_generator():
    one, other = ([[t.clone() for t in drawn((50,), BF16)] for _ in range(2)] for _ in range(2))
    with kernels.use("reference"):
        first = take(one, stochastic=generator(3))
        again = take(other, stochastic=generator(3))
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    assert same_bits(first[0], first[3])  # the update is from the moments as they were computed
    assert not same_bits(first[1], first[4])


def test_a_number_is_rounded_to_a_neighbour_and_as_often_as_it_is_near():
    low, high = torch.tensor(1.0), torch.tensor(1.0 + 2**-7)
    for share in (0.0, 2**-16, 0.25, 0.75, 1 - 2**-16):
        x = (low + share * (high - low)).expand(1 << 16)
        for sign in (1, -1):
            rounded = _rounded(sign * x, torch.arange(1 << 16, dtype=torch.int32))  # every noise there is
            assert set(rounded.tolist()) <= {sign * 1.0, sign * (1.0 + 2**-7)}
            assert (rounded == sign * high).sum() == share * (1 << 16)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("path", ["reference", "triton"])
def test_what_is_not_finite_stays_so(path):
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000], dtype=torch.int32)  # NaN of all kinds
    grad = torch.cat([bits.view(F32), torch.tensor([float("inf"), 1.0])])
    with kernels.use(path):
        m, v = take(
            [[torch.ones(6), grad, torch.zeros(6, dtype=BF16), torch.zeros(6, dtype=BF16)]], stochastic=generator()
        )[1:]
    for moment in (m, v):
        assert moment[:4].isnan().all() and moment[4].isinf() and moment[5].isfinite()


def test_the_random_bits_are_even_and_independent_of_one_another():
    words = torch.stack([_random_bits(torch.empty(1 << 15), seed) for seed in (0, 1, 2, 12345)])
    bits = ((words[..., None] >> torch.arange(32)) & 1).double() * 2 - 1  # [seeds, elements, 32]
    columns = bits.permute(0, 2, 1).reshape(128, -1)
    follow = torch.cat([columns[:, :-1], columns[:, 1:]])  # beside every bit, that of the next element
    mean = follow.mean(1)
    apart = follow @ follow.t() / follow.shape[1] - torch.eye(256)
    # 33,000 pairs of means over 2^15 tosses: six standard deviations are not exceeded once in ten thousand runs.
    assert mean.abs().max() <= 6 / 2**7.5
    assert apart.abs().max() <= 6 / 2**7.5


def test_a_slow_second_moment_is_biased_by_rounding_to_nearest_and_not_by_rounding_at_random():
    means = {}
    for name, kept, stochastic in (("float32", F32, None), ("nearest", BF16, None), ("stochastic", BF16, generator(7))):
        tensors = [torch.zeros(1000), torch.empty(1000), torch.zeros(1000, dtype=kept), torch.zeros(1000, dtype=kept)]
        g = generator(1)
        with kernels.use("reference"):
            for step in range(1, 3001):
                tensors[1].normal_(generator=g)  # its square is chi-squared, of mean 1
                take([tensors], step, betas=(0.9, 0.999), stochastic=stochastic)
        means[name] = float(tensors[3].double().mean()) / (1 - 0.999**3000)
    # A mean of 1000 elements, each of variance 2 (1 - beta) / (1 + beta); a rounding adds a quarter of a unit squared.
    assert abs(means["float32"] - 1) < 5 * (2 * 0.001 / 2 / 1000) ** 0.5
    assert abs(means["stochastic"] - means["float32"]) < 5 * ((2**-7) ** 2 / 4 / (2 * 0.001) / 1000) ** 0.5
    assert means["nearest"] > 1.1


def test_no_weights_are_no_step_and_moments_that_cannot_be_are_refused():
    adamw_step([], [], [], [], step=1, **SETTINGS)
    w, grad, m, v = drawn((3,), F32)
    with pytest.raises(ValueError, match=r"float32 or all bfloat16, not .*float16"):
        take([[w, grad, m.half(), v.half()]])
    with pytest.raises(ValueError, match="float32 or all bfloat16"):
        take([[w, grad, m.to(BF16), v]])
    with pytest.raises(ValueError, match="step float32 masters"):
        take([[t.to(BF16) for t in (w, grad, m, v)]])
    with pytest.raises(ValueError, match="stochastic rounding is for bfloat16"):
        take([[w, grad, m, v]], stochastic=generator())
    with pytest.raises(ValueError, match="shorter"):
        adamw_step([w], [grad], [m], [], step=1, **SETTINGS)
    with pytest.raises(ValueError, match=r"one shape, not \[\[3\], \[2\], \[3\], \[3\]\]"):
        take([[w, grad[:2], m, v]])


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize(("kept", "seed"), [(F32, None), (BF16, None), (BF16, 5)])
def test_torch_knows_the_operation(path, kept, seed):
    settings = (seed, 0.01, 0.9, 0.95, 1e-8, 0.1, 3)
    with kernels.use(path):
        torch.library.opcheck(torch.ops.tangram.adamw, (*drawn((5, 3), kept), *settings))
    meta = [t.to("meta") for t in drawn((5, 3), kept)]
    assert torch.ops.tangram.adamw(*meta, *settings) is None

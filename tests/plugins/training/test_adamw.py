"""AdamW against its paper (arXiv:1711.05101, algorithm 2), worked by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tangram.core.step import set_lr
from tangram.plugins.training.adamw import AdamWConfig
from tangram.testing import seeds
from tangram.testing.samples import normal

RATES = (0.01, 0.003, 0.0005)


def drawn(seed: int, scale: float = 1.0) -> list[tuple[str, nn.Parameter]]:
    """Return a matrix, the weights of two experts, and a norm."""
    shapes = {"down.weight": (3, 2), "experts.weight": (2, 2, 3), "norm.weight": (4,)}
    values = (scale * normal(*shape, seed=seed + i) for i, shape in enumerate(shapes.values()))
    return [(name, nn.Parameter(value)) for name, value in zip(shapes, values, strict=True)]


def by_hand(theta: Tensor, grads: list[Tensor], config: AdamWConfig, decay: float) -> Tensor:
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    one, two = config.betas
    for t, (grad, lr) in enumerate(zip(grads, RATES, strict=True), start=1):
        m = one * m + (1 - one) * grad
        v = two * v + (1 - two) * grad**2
        corrected = (m / (1 - one**t)) / ((v / (1 - two**t)).sqrt() + config.eps)
        theta = theta - lr * (corrected + decay * theta)
    return theta


@given(
    betas=st.tuples(st.sampled_from((0.0, 0.9)), st.sampled_from((0.95, 0.999))),
    decay=st.sampled_from((0.0, 0.1)),
    scale=st.sampled_from((1e-8, 1.0, 1e4)),
    seed=seeds(),
)
def test_three_steps_are_those_of_the_paper_and_norms_do_not_decay(betas, decay, scale, seed):
    config = AdamWConfig(betas=betas, weight_decay=decay)
    parameters = drawn(seed)
    start = {name: parameter.detach().clone() for name, parameter in parameters}
    optimizer = config.build(parameters)
    grads: dict[str, list[Tensor]] = {name: [] for name, _ in parameters}
    for step, lr in enumerate(RATES):
        for name, parameter in parameters:
            parameter.grad = scale * normal(*parameter.shape, seed=seed + 100 * step + parameter.numel())
            grads[name].append(parameter.grad.clone())
        set_lr(optimizer, lr)
        optimizer.step()
    for name, parameter in parameters:
        expected = by_hand(start[name], grads[name], config, 0.0 if name == "norm.weight" else decay)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \[0.9, 1.0\]"),
        ({"betas": (-0.1, 0.9)}, r"betas must be in \[0, 1\), got \[-0.1, 0.9\]"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"rounding": "stochastic"}, "rounding: stochastic is for moments: bfloat16"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        AdamWConfig(**settings)


def test_bfloat16_moments_stay_within_the_error_that_their_rounding_can_make():
    unit = torch.finfo(torch.bfloat16).eps / 2
    config = AdamWConfig(moments="bfloat16", eps=1e-3)
    coarse, fine = drawn(4), drawn(4)
    one, two = config.build(coarse), AdamWConfig(eps=1e-3).build(fine)
    bound = {name: torch.zeros_like(p) for name, p in fine}
    error = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in fine}
    for step in range(12):
        for (_, a), (_, b) in zip(coarse, fine, strict=True):
            a.grad = normal(*a.shape, seed=50 * step + a.numel())
            b.grad = a.grad.clone()
        set_lr(one, 0.01)
        set_lr(two, 0.01)
        kept = {name: {key: value.clone() for key, value in two.state[p].items()} for name, p in fine}
        one.step()
        two.step()
        for (name, a), (_, b) in zip(coarse, fine, strict=True):
            bound[name] += _update_error(error, name, kept[name], two.state[b], step + 1, unit)
            assert bool(((a - b).abs() <= bound[name] + 1e-12).all()), name
            assert not torch.equal(a, b) or step == 0
            assert {one.state[a][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


def _update_error(error, name, kept, state, t, unit):
    """Return how far the update can be off at step t, and carry on how far the two moments can be."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    off_m, off_v = error[name]
    if t > 1:  # the moments of the step before were rounded once more, then decayed
        off_m = 0.9 * (off_m + unit * (kept["exp_avg"].abs() + off_m))
        off_v = 0.95 * (off_v + unit * (kept["exp_avg_sq"] + off_v))
    error[name] = (off_m, off_v)
    one, two = 1 - 0.9**t, 1 - 0.95**t
    root, least = (v / two).sqrt() + 1e-3, ((v - off_v).clamp_min(0) / two).sqrt() + 1e-3
    return 0.01 / one * ((m.abs() + off_m) / least - m.abs() / root)


def test_only_a_second_decay_rate_that_bfloat16_does_not_follow_is_warned_of(recwarn):
    AdamWConfig(moments="bfloat16", betas=(0.9, 0.95)).build(drawn(0))
    AdamWConfig(moments="float32", betas=(0.9, 0.999)).build(drawn(0))
    AdamWConfig(moments="bfloat16", rounding="stochastic", betas=(0.9, 0.999)).build(drawn(0))
    assert not recwarn
    with pytest.warns(UserWarning, match=r"does not follow betas\[1\] = 0.999: take rounding: stochastic, .* 0.98$"):
        AdamWConfig(moments="bfloat16", betas=(0.9, 0.999)).build(drawn(0))


def test_moments_rounded_at_random_are_neighbours_of_the_number_that_differ_by_weight_and_step():
    config = AdamWConfig(betas=(0.0, 0.95), moments="bfloat16", rounding="stochastic")
    one, other = (nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    optimizer, grad, kept = config.build([("one", one), ("other", other)]), normal(64, 64, seed=3).float(), []
    for _ in range(2):
        one.grad = other.grad = grad
        set_lr(optimizer, 0.01)
        optimizer.step()
        kept += [optimizer.state[p]["exp_avg"].clone() for p in (one, other)]  # the gradient, rounded
    for moment in kept:
        off = (moment.float() - grad).abs() / grad.abs()
        assert off.max() < 2**-7
        assert (off > 2**-8).any()  # not to nearest
    assert all(not torch.equal(a, b) for i, a in enumerate(kept) for b in kept[:i])

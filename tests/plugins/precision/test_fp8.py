"""FP8 where the paper has it, and nowhere else; what is kept; what does not change a gradient."""

import math

import pytest
import torch
from torch import nn
from twins import same_bits

from tangram.core import build_model, load_preset
from tangram.core.autograd import Recompute
from tangram.core.context import Context
from tangram.plugins.precision import fp8
from tangram.plugins.precision.fp8 import FP8Config, FP8GroupedLinear, FP8Linear
from tangram.testing.samples import normal

COUNTS = torch.tensor([130, 0, 126])
PLAIN = FP8Config()


def linear(config: FP8Config = PLAIN, width: int = 200, out: int = 150, recompute: str = "none", **kwargs):
    torch.manual_seed(0)
    ctx = Context(dim=width, init_std=0.05, precision=config.build(), recompute=Recompute(recompute))
    return ctx, ctx.linear(width, out, **kwargs)


def grouped(config: FP8Config = PLAIN, width: int = 200, out: int = 150, **kwargs):
    torch.manual_seed(0)
    ctx = Context(dim=width, init_std=0.05, precision=config.build())
    return ctx, ctx.grouped_linear(len(COUNTS), width, out, **kwargs)


def x(*shape: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return normal(*shape, seed=seed).to(dtype).requires_grad_()


def test_attention_and_feed_forwards_are_in_fp8_and_nothing_else():
    model = build_model(load_preset("v3-tiny-fp8", "data={use: synthetic}"))
    low = {name for name, module in model.named_modules() if isinstance(module, FP8Linear | FP8GroupedLinear)}
    ends = {name.rpartition(".")[2] for name in low}
    assert ends == {"q_down", "q_up", "kv_down", "kv_up", "out", "gate_up", "down"}
    high = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - low
    kinds = {name.rpartition(".")[2] for name in high}
    router = "centroids"
    assert kinds - {name for name in kinds if "norm" in name} == {"embedding", "head", "projection", router}


@pytest.mark.parametrize(("input", "wanted"), [("plain", False), ("attention", True), ("dispatched", True)])
def test_scales_are_powers_of_two_for_what_attention_or_a_dispatch_gives(input, wanted):
    for module in (linear(input=input)[1], grouped(input=input)[1]):
        scales = module.products.quantize(x(256, 200).detach()).scales
        assert bool((scales.frexp()[0] == 0.5).all()) == wanted


def test_the_gradient_that_is_dispatched_has_scales_that_are_powers_of_two():
    assert grouped(input="plain")[1].products.gradient.power_of_two
    assert not grouped(input="dispatched")[1].products.gradient.power_of_two
    assert not linear()[1].products.gradient.power_of_two


def test_backward_keeps_a_byte_for_each_input():
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    _, module = linear(width=256)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x(64, 256))
    assert sum(kept) == 64 * 256 + 64 * 2 * 4  # codes, and a scale for each tile
    kept.clear()
    _, module = linear(FP8Config(attention_cache="e5m6"), width=256, input="attention")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x(64, 256))
    assert sum(kept) == 64 * 256 * 3 // 2 + 64 * 2 * 4


def test_e5m6_keeps_the_input_of_attentions_output_projection_nearer():
    errors = {}
    for cache in ("e4m3", "e5m6"):
        _, module = linear(FP8Config(attention_cache=cache), input="attention")
        inside = x(40, 200).detach()
        products = module.products
        back = products.restored(products.kept(inside, products.quantize(inside)), 200, torch.float32)
        errors[cache] = float((back - inside.float()).abs().max() / inside.float().abs().max())
    assert errors["e5m6"] <= 2**-7 < errors["e4m3"]


@pytest.mark.parametrize("config", [FP8Config(), FP8Config(format="hybrid", attention_cache="e5m6")])
@pytest.mark.parametrize("input", ["plain", "attention", "dispatched"])
def test_rows_that_are_cut_at_whole_tiles_give_the_same_gradients(config, input):
    _, module = linear(config, input=input)
    rows, grad = x(384, 200), normal(384, 150, seed=2).bfloat16()
    module(rows).backward(grad)
    whole, x_grad = module.weight.grad.clone(), rows.grad.clone()
    module.weight.grad = rows.grad = None
    for part in (slice(0, 128), slice(128, 384)):
        module(rows[part]).backward(grad[part])
    assert same_bits(rows.grad, x_grad)
    # Each part's sum is rounded to bfloat16, and their sum in float32: the rounding of products, not of FP8.
    assert float((module.weight.grad - whole).abs().max() / whole.abs().max()) < 2**-7
    module.weight.grad = None
    for part in (slice(0, 100), slice(100, 384)):
        module(rows[part]).backward(grad[part])
    off = float((module.weight.grad - whole).norm() / whole.norm())
    assert off > 2**-7, "tiles of other rows round otherwise"


def test_an_expert_is_a_linear_of_its_own_rows():
    _, many = grouped()
    rows, grad = x(256, 200), normal(256, 150, seed=2).bfloat16()
    many(rows, COUNTS).backward(grad)
    start = 0
    for expert, count in enumerate(COUNTS.tolist()):
        _, one = linear()
        one.products = many.products
        with torch.no_grad():
            one.weight.copy_(many.weight[expert])
        inside = rows.detach()[start : start + count].requires_grad_()
        y = one(inside)
        y.backward(grad[start : start + count])
        scale = rows.grad.float().abs().max()
        own = rows.grad[start : start + count]
        assert count == 0 or float((inside.grad.float() - own.float()).abs().max() / scale) < 2**-7
        difference = (one.weight.grad - many.weight.grad[expert]).abs().max()
        assert float(difference) <= 2**-7 * float(many.weight.grad.abs().max())
        start += count


def test_an_outlier_spoils_its_tile_and_with_one_scale_the_whole():
    errors = {}
    for shared in ("tile", "tensor"):
        _, module = linear(FP8Config(granularity=shared, compute="float32"), width=256)
        rows = normal(64, 256, seed=3).float()
        rows[0, 0] = 1e6  # beyond what one exponent range holds beside the others: kernels in FP8 flush them
        exact = rows @ module.weight.detach().t()
        off = ((module(rows).detach() - exact).norm(dim=1) / exact.norm(dim=1))[1:]
        errors[shared] = float(off.median())
    assert errors["tile"] < 0.05 < 0.5 < errors["tensor"]


def test_short_sums_are_not_those_that_are_promoted():
    results = []
    for accumulation in ("promoted", "limited"):
        _, module = linear(FP8Config(accumulation=accumulation, compute="float32"), width=1024)
        rows = normal(128, 1024, seed=3).float().requires_grad_()
        y = module(rows)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), rows.grad, module.weight.grad))
    for promoted, limited in zip(*results, strict=True):
        off = float((promoted - limited).norm() / promoted.norm())
        assert 1e-5 < off < 1e-2


def test_recomputed_inputs_are_not_kept_and_give_the_same_bits():
    gradients = []
    for recompute in ("none", "selective"):
        ctx, module = linear(recompute=recompute)
        start = x(256, 200)
        with ctx.recompute.scope():
            y = module(ctx.recompute(torch.tanh, start))
        y.backward(normal(256, 150, seed=2).bfloat16())
        gradients.append((start.grad, module.weight.grad))
    for plain, again in zip(*gradients, strict=True):
        assert same_bits(plain, again)


def test_the_measures_say_what_is_lost():
    _, module = linear(FP8Config(compute="float32"), width=128)
    rows = torch.full((4, 128), 1.0)
    rows[:, 1:65] = 1e-9
    measures = module.measures(rows)
    assert measures["fp8_peak"] == 1.0
    assert measures["fp8_underflow"] == 0.5
    assert 0 < measures["fp8_error"] < 0.1
    assert math.isfinite(grouped()[1].measures(x(256, 200).detach(), COUNTS)["fp8_error"])


def test_without_a_compiler_it_says_what_that_costs(monkeypatch):
    monkeypatch.setattr(fp8, "compiler", lambda: None)
    with pytest.warns(UserWarning, match=r"C\+\+ compiler"):
        FP8Config().build()


def test_a_module_of_it_is_still_a_module():
    assert isinstance(linear()[1], nn.Module)
    assert "weight" in linear()[1].state_dict()

"""Cases of quantise: rows in tiles, the transposed in tiles, weights in blocks, and after SwiGLU in one pass."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from operations.case import Case, Function, Peer, Result, same_bits
from operations.scale import Scale
from tangram.kernels import quantize_blocks, quantize_tiles, swiglu, swiglu_quantized
from tangram.kernels.compiled import compiler
from tangram.kernels.native import native_passes

E4M3 = torch.float8_e4m3fn


def cases(scale: Scale) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield them."""
    plain: list[tuple[str, Function, Function, str, bool]] = [
        ("quantize_tiles", quantize_tiles, tiles, "triton_fp8_blockwise_act_quant_lhs", False),
        (
            "quantize_tiles, transposed",
            partial(quantize_tiles, transposed=True),
            lambda x: tiles(x.t()),
            "triton_fp8_blockwise_act_quant_transposed_lhs",
            False,
        ),
        ("quantize_blocks", quantize_blocks, blocks, "triton_fp8_blockwise_weight_quant_transposed_rhs", True),
    ]
    for name, ours, formula, peer, turned in plain:
        yield name, partial(_case, scale, name, ours, formula, {"torchao": Peer(partial(_torchao, peer, turned))})
    if scale.device == "cpu" and compiler() is not None:
        for name, ours, formula, _, _ in plain[::2]:
            native = partial(ours, passes=native_passes())
            yield f"{name}, in C++", partial(_case, scale, f"{name}, in C++", native, formula, {})
    yield "swiglu_quantized", partial(_activation, scale)


def tiles(x: Tensor) -> Result:
    """Return the codes and scales of a matrix in tiles of 1 x 128."""
    each = x.float().unflatten(1, (-1, 128))
    scales = each.abs().amax(-1).clamp_min(1e-4) / 448
    return (each / scales.unsqueeze(-1)).clamp(-448, 448).to(E4M3).flatten(1), scales


def blocks(w: Tensor) -> Result:
    """Return the codes and scales of a matrix in blocks of 128 x 128."""
    each = w.float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # [down, 128, across, 128]
    scales = each.abs().amax((1, 3)).clamp_min(1e-4) / 448
    codes = (each / scales[:, None, :, None]).clamp(-448, 448).to(E4M3)
    return codes.flatten(2).flatten(0, 1), scales


def _case(scale: Scale, name: str, ours: Function, formula: Function, peers: dict[str, Peer]) -> Case:
    x = scale.draw(scale.tokens, scale.dim)
    return Case(
        operation=name,
        shape=f"{scale.tokens} x {scale.dim}",
        inputs=(x,),
        ours=ours,
        formula=formula,
        reference=formula,
        check=same_bits,
        peers=peers,
    )


def _activation(scale: Scale) -> Case:
    rows = scale.tokens
    return Case(
        operation="swiglu_quantized",
        shape=f"{rows} x 2 * {scale.hidden}",
        inputs=(scale.draw(rows, 2 * scale.hidden),),
        ours=swiglu_quantized,
        formula=_activated,
        # The codes are those of two passes, each of which has a row of its own.
        reference=lambda x: tiles(swiglu(x)),
        check=same_bits,
    )


def _activated(x: Tensor) -> Result:
    gate, up = x.chunk(2, -1)
    return tiles(F.silu(gate) * up)


def _torchao(name: str, turned: bool) -> Function:
    from torchao.prototype.blockwise_fp8_training import kernels

    quantise: Function = getattr(kernels, name)
    if turned:
        return lambda w: tuple(each.t() for each in quantise(w, 128))
    return lambda x: quantise(x, 128)

"""Strategies for what a piece of a model is given: its surroundings, and the routing of some tokens."""

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from tangram.core.autograd import Recompute
from tangram.core.context import Context
from tangram.core.experiment import RECOMPUTE
from tangram.core.layers import FullPrecision
from tangram.core.records import RouterStats, Routing
from tangram.testing.strategies import Size, _size, seeds

_ROWS = st.integers(1, 3)
_COLUMNS = st.integers(1, 6)


@st.composite
def contexts(draw: st.DrawFn, dim: Size, *, dtype: torch.dtype = torch.float64) -> Context:
    """Draw the surroundings of a component: any layer of a small model, weights of any size, anything recomputed.

    Args:
        draw: Given by Hypothesis.
        dim: Width D of the model.
        dtype: Compute dtype.
    """
    n_layers = draw(st.integers(1, 4))
    return Context(
        dim=_size(draw, dim),
        layer=draw(st.integers(0, n_layers - 1)),
        n_layers=n_layers,
        init_std=draw(st.sampled_from((0.3, 0.006))),
        precision=FullPrecision(dtype),
        recompute=Recompute(draw(st.sampled_from(RECOMPUTE))),
    )


@st.composite
def routings(
    draw: st.DrawFn,
    n_experts: Size,
    *,
    top_k: Size | None = None,
    sequences: Size = _ROWS,
    length: Size = _COLUMNS,
    dtype: torch.dtype = torch.float64,
) -> Routing:
    """Draw the routing of some tokens as a router under a bias leaves it: even, or more and more on the first experts.

    Args:
        draw: Given by Hypothesis.
        n_experts: Experts E.
        top_k: Experts K of a token; by default any number.
        sequences: Sequences B.
        length: Positions S.
        dtype: Of gates and affinities.
    """
    n = _size(draw, n_experts)
    k = draw(st.integers(1, n)) if top_k is None else _size(draw, top_k)
    shape = (_size(draw, sequences), _size(draw, length), n)
    generator = torch.Generator().manual_seed(draw(seeds()))
    affinity = 0.01 + 0.98 * torch.rand(shape, generator=generator, dtype=torch.float64)
    bias = -draw(st.sampled_from((0.0, 0.3, 100.0))) * torch.arange(n)  # the last one: all tokens alike
    ids = (affinity + bias).topk(k, -1).indices
    mean = (affinity / affinity.sum(-1, keepdim=True)).mean(1).to(dtype)
    stats = RouterStats(ids, _counted(ids, n), _counted(affinity.topk(k, -1).indices, n), mean)
    return Routing(ids.flatten(0, 1), affinity.gather(-1, ids).flatten(0, 1).to(dtype), stats)


def _counted(ids: Tensor, n_experts: int) -> Tensor:
    return one_hot(ids, n_experts).sum((1, 2))

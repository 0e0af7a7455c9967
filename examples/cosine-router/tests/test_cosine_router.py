"""The affinities against a loop over experts, and what every router owes."""

import math

import pytest
import torch
from tangram_cosine_router import CosineConfig

from tangram.core.context import BuildError, Context
from tangram.core.layers import FullPrecision
from tangram.testing import RouterContract, assert_close


class TestCosine(RouterContract):
    config = CosineConfig(top_k=2, rank=4)


class TestCosineUnnormalised(RouterContract):
    config = CosineConfig(top_k=3, rank=2, temperature=1.0, normalise=False)


def router(n_experts: int = 5, **fields):
    torch.manual_seed(0)
    return CosineConfig(**fields).build(Context(dim=6, precision=FullPrecision(torch.float64)), n_experts)


def test_affinities_are_the_loop_over_experts() -> None:
    module, x = router(top_k=2, rank=3, temperature=0.4), torch.randn(2, 3, 6, dtype=torch.float64)
    actual = module.affinity(x)
    for b in range(2):
        for s in range(3):
            token = [float(row @ x[b, s]) for row in module.projection.detach()]
            scores = []
            for centroid in module.centroids.tolist():
                product = sum(t * c for t, c in zip(token, centroid, strict=True))
                scores.append(math.exp(product / math.hypot(*token) / math.hypot(*centroid) / 0.4))
            expected = torch.tensor([score / sum(scores) for score in scores], dtype=torch.float64)
            assert_close(actual[b, s], expected, length=20)


def test_the_length_of_token_or_centroid_changes_nothing() -> None:
    module, x = router(top_k=2), torch.randn(2, 3, 6, dtype=torch.float64)
    before = module.affinity(x)
    with torch.no_grad():
        module.centroids.mul_(torch.tensor([0.1, 1.0, 2.0, 30.0, 5.0])[:, None])
    assert_close(module.affinity(7.0 * x), before, length=100)


def test_a_token_of_zeros_is_everyones() -> None:
    equal = torch.full((1, 1, 5), 0.2, dtype=torch.float64)
    assert_close(router(top_k=2).affinity(torch.zeros(1, 1, 6)), equal, length=10)


def test_more_experts_for_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(BuildError, match="router: top_k 6 is more than the 5 experts"):
        Context(dim=6).child("router", CosineConfig(top_k=6).build, 5)

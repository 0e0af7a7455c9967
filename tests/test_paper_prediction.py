"""The naive token losses against closed forms: what a head that knows nothing, or all, must pay."""

import math

import pytest
import torch
from attrs import evolve
from paper import IGNORE, MLAShape, MTPDepth, fill, mla, mtp, next_token
from torch import Tensor


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


def plain_block(h: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
    return h


def depth(dim: int, seed: int, block=plain_block) -> MTPDepth:
    norms = {"embedding_norm": (dim,), "hidden_norm": (dim,), "output_norm": (dim,)}
    weights = fill({**norms, "projection": (dim, 2 * dim)}, seed)
    return MTPDepth(block=block, **weights)


def packed(segments: list[int]) -> dict[str, Tensor]:
    """One row of isolated documents: the last target of each but the row's last is unknown."""
    length = len(segments)
    window = torch.arange(length + 1) % 5
    targets = window[1:].clone()
    ends = [p for p in range(length - 1) if segments[p] != segments[p + 1]]
    targets[ends] = IGNORE
    numbers = torch.tensor(segments)
    positions = torch.tensor([p - segments.index(segment) for p, segment in enumerate(segments)])
    return {"tokens": window[:-1], "targets": targets, "positions": positions, "segments": numbers}


def test_next_token_of_a_clueless_head_is_log_vocabulary() -> None:
    targets = torch.tensor([1, IGNORE, 4])
    assert float(next_token(torch.zeros(3, 5), targets)) == pytest.approx(math.log(5))
    assert float(next_token(torch.zeros(3, 5), targets, n_targets=8)) == pytest.approx(math.log(5) / 4)
    certain = torch.full((3, 5), -1e3).scatter(1, targets.clamp_min(0)[:, None], 1e3)
    assert float(next_token(certain, targets)) == pytest.approx(0)


@pytest.mark.parametrize(("segments", "targets", "kept"), [([0] * 6, 6, [5, 4]), ([0, 0, 0, 1, 1, 1], 5, [3, 1])])
def test_mtp_divides_each_depth_by_all_targets(segments: list[int], targets: int, kept: list[int]) -> None:
    """A clueless head pays log V for each kept term; T stays the number of next-token targets."""
    row = packed(segments)
    hidden = normal(6, 4, seed=16)
    tables = {"embedding": normal(5, 4, seed=17), "head": torch.zeros(5, 4)}
    loss = mtp(hidden, **row, depths=[depth(4, 18), depth(4, 19)], **tables)
    assert float(loss) == pytest.approx(math.log(5) * sum(kept) / targets / 2)


def test_mtp_joins_the_token_ahead_and_predicts_the_one_after() -> None:
    """A projection that keeps the embedding and a head that reads it back: depth k sees token p + k."""
    eye = torch.eye(5, dtype=torch.float64)
    keep = torch.cat([eye, torch.zeros(5, 5)], dim=1)
    ones = torch.ones(5)
    copy = MTPDepth(embedding_norm=ones, hidden_norm=ones, projection=keep, block=plain_block, output_norm=ones)
    row = packed([0] * 6)
    hidden = normal(6, 5, seed=20).requires_grad_()
    cycle = torch.roll(eye, 1, 0) * 1e3
    loss = mtp(hidden, **row, depths=[copy, copy], embedding=eye, head=cycle)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert float(gradient.abs().max()) == 0.0
    assert mtp(hidden, **row, depths=[copy], embedding=eye, head=eye * 1e3).item() > 100


def test_mtp_never_crosses_a_document() -> None:
    """A packed row costs what its documents cost apart, each against the row's count of targets."""
    shape = MLAShape(n_heads=1, nope_dim=2, rope_dim=2, value_dim=2)
    weights = fill(shape.weights(4, None, 3), seed=21)

    def block(h: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        return h + mla(h, weights, shape, positions, segments)

    row = packed([0, 0, 0, 0, 1, 1, 1])
    hidden = normal(7, 4, seed=22)
    settings = {
        "depths": [depth(4, 23, block), depth(4, 24, block)],
        "embedding": normal(5, 4, seed=25),
        "head": normal(5, 4, seed=26),
        "n_targets": 6,
    }
    apart = [
        mtp(hidden[cut], **{name: tensor[cut] for name, tensor in row.items()}, **settings)
        for cut in (slice(0, 4), slice(4, 7))
    ]
    assert close(mtp(hidden, **row, **settings), sum(apart))


def test_each_depth_continues_what_the_head_read() -> None:
    """A second depth that passes its hidden input on predicts one token further from the first's output.

    The first depth's norm flips signs: what it gives stays normed, and a forgotten norm is seen.
    """
    row = packed([0] * 6)
    hidden, signs = normal(6, 4, seed=27), torch.tensor([1.0, -1.0, -1.0, 1.0])
    first, ones = evolve(depth(4, 28), output_norm=signs), torch.ones(4)
    keep = torch.cat([torch.zeros(4, 4), torch.eye(4)], dim=1)
    second = MTPDepth(embedding_norm=ones, hidden_norm=ones, projection=keep, block=plain_block, output_norm=ones)
    tables = {"embedding": normal(5, 4, seed=30), "head": normal(5, 4, seed=31), "eps": 0.0, "n_targets": 6}
    further = {**row, "targets": torch.cat([row["targets"][1:], torch.tensor([IGNORE])])}
    one, both = (mtp(hidden, **row, depths=depths, **tables) for depths in ([first], [first, second]))
    assert close(2 * both - one, mtp(hidden, **further, depths=[first], **tables))


def test_the_head_reads_a_normed_state() -> None:
    row, layer = packed([0] * 4), depth(4, 32)
    tables = {"embedding": normal(5, 4, seed=33), "head": normal(5, 4, seed=34), "eps": 0.0}
    hidden = normal(4, 4, seed=35)
    loud = evolve(layer, projection=7 * layer.projection)
    assert close(mtp(hidden, **row, depths=[layer], **tables), mtp(hidden, **row, depths=[loud], **tables))

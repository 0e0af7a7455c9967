"""Selective recomputation over whole blocks: not a bit of a gradient moves, and less is held."""

import gc
from collections.abc import Callable

import pytest
import torch
from attrs import evolve
from builders import SMALL_BLOCK, SMALL_MLA
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tangram.core.block import Block
from tangram.core.experiment import BlockConfig
from tangram.core.records import Carry
from tangram.plugins.attention.gqa import GQAConfig
from tangram.plugins.moe.swiglu import SwiGLUConfig
from tangram.testing.samples import context, documents, filled, normal

DIM = 6
BLOCKS = {
    "mla and moe": SMALL_BLOCK,
    "mla and swiglu": BlockConfig(attention=evolve(SMALL_MLA, q_rank=None), feedforward=SwiGLUConfig(hidden=7)),
    "gqa and moe": evolve(SMALL_BLOCK, attention=GQAConfig(n_heads=2, head_dim=4)),
}
EVERY = pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS.keys())


def worked(config: BlockConfig, policy: str, x: Tensor, segments: list[list[int]]) -> tuple[Block, Tensor]:
    """Return a block and its output, each phase in a scope of its own as a model runs it."""
    block = filled(Block(config, context(DIM, recompute=policy)), 0)
    carry = Carry(hidden=x)
    for phase in block.phases(*documents(segments)):
        with block.recompute.scope():
            carry = phase.fn(carry)
    assert carry.hidden is not None
    return block, carry.hidden


class Watch(TorchDispatchMode):
    """Remembers every storage that is made inside, without holding it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                ref = StorageWeakRef(storage)
                self.made.setdefault(ref.cdata, (ref, storage.nbytes()))
        return out

    def held(self) -> int:
        gc.collect()
        return sum(size for ref, size in self.made.values() if not ref.expired())


def held(run: Callable[[], tuple[Block, Tensor]]) -> int:
    """Return the bytes that are alive after a forward because its backward wants them."""
    with Watch() as watch:
        kept = run()
    assert kept[1].requires_grad
    return watch.held()


@EVERY
@pytest.mark.parametrize("segments", [[[0] * 5, [0] * 5], [[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]])
def test_gradients_are_those_of_the_plain_forward_bit_for_bit(config, segments):
    grads = []
    for policy in ("none", "selective"):
        x = normal(2, 5, DIM, seed=1).requires_grad_()
        block, out = worked(config, policy, x, segments)
        out.sin().sum().backward()
        named = {name: parameter.grad for name, parameter in block.named_parameters()}
        grads.append({"out": out.detach(), "x": x.grad, **named})
    for name, plain in grads[0].items():
        assert plain is not None, name
        assert plain.any(), name
        assert torch.equal(plain, grads[1][name]), name


@pytest.mark.parametrize(
    ("name", "width"),
    # Queries, keys, keys with values as they come up from the latent; the product inside each SwiGLU.
    [("mla and moe", 14 + 14 + 16 + 2 * 3), ("mla and swiglu", 14 + 14 + 16 + 7), ("gqa and moe", 2 * 3)],
)
def test_what_can_be_made_again_is_not_held_for_backward(name, width):
    x = normal(2, 64, DIM, seed=1).requires_grad_()
    plain, saving = (
        held(lambda policy=policy: worked(BLOCKS[name], policy, x, [[0] * 64] * 2)) for policy in ("none", "selective")
    )
    assert plain - saving >= width * 2 * 64 * x.element_size()

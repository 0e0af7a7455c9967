"""Toy components for every slot that a preset must fill, a preset of them, and strategies that draw them."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from attrs import field, frozen
from attrs.validators import gt, in_, min_len
from hypothesis import strategies as st

from tangram.core.contracts import BalancerConfig, RouterConfig
from tangram.core.curve import Curve
from tangram.core.plugins import Plugins
from tangram.core.presets import Resolved, resolve
from tangram.core.registry import component
from tangram.testing.strategies import curves


@component("attention", use="wide")
@frozen(kw_only=True)
class Wide:
    n_heads: int = field(validator=gt(0))
    scale: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    mode: Literal["plain", "fancy"] = "plain"
    rank: int | None = 7

    def build(self, ctx: object) -> object: ...


@component("attention", use="narrow")
@frozen(kw_only=True)
class Narrow:
    window: int = 4

    def build(self, ctx: object) -> object: ...


@component("router", use="toy_top")
@frozen(kw_only=True)
class TopK:
    top_k: int = field(default=2, validator=gt(0))

    def build(self, ctx: object, n_experts: int) -> object: ...


@component("balancer", use="toy_free")
@frozen(kw_only=True)
class Free:
    speed: Curve = field(default=Curve.constant(1e-3))

    def build(self, ctx: object, n_experts: int) -> object: ...


@component("feedforward", use="dense")
@frozen(kw_only=True)
class Dense:
    hidden: int = 8

    def build(self, ctx: object) -> object: ...


@component("feedforward", use="sparse")
@frozen(kw_only=True)
class Sparse:
    n_experts: int = field(validator=gt(0))
    router: RouterConfig
    balancer: BalancerConfig | None = None
    sizes: tuple[int, ...] = ()
    names: Mapping[str, int] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if isinstance(self.router, TopK) and self.router.top_k > self.n_experts:
            raise ValueError(f"router.top_k={self.router.top_k} is more than n_experts={self.n_experts}")

    def build(self, ctx: object) -> object: ...


@component("objective", use="guess")
@frozen(kw_only=True)
class Guess:
    weight: Curve = field(default=Curve.constant(1.0))

    def build(self, ctx: object, block: object) -> object: ...


@component("objective", use="balance")
@frozen(kw_only=True)
class Balance:
    weight: Curve = field(default=Curve.constant(0.01))
    share: float = 0.5

    def build(self, ctx: object, block: object) -> object: ...


@component("precision", use="toy")
@frozen(kw_only=True)
class Precise:
    dtype: str = field(default="a", validator=in_(("a", "b")))

    def build(self) -> object: ...


@component("data", use="toy")
@frozen(kw_only=True)
class Rows:
    files: tuple[str, ...] = field(default=("x",), validator=min_len(1))
    shuffle: bool = True

    def build(self, train: object, vocab_size: int) -> object: ...


@component("optimizer", use="toy")
@frozen(kw_only=True)
class Still:
    decay: float = 0.0

    def build(self, parameters: object) -> object: ...


@component("guard", use="toy")
@frozen(kw_only=True)
class Trusting:
    def build(self) -> object: ...


@component("observer", use="blind")
@frozen(kw_only=True)
class Blind:
    every: int = 1

    def build(self) -> object: ...


@component("pipeline", use="toy")
@frozen(kw_only=True)
class InOrder:
    def build(self) -> object: ...


@component("sharding", use="toy")
@frozen(kw_only=True)
class Everything:
    def build(self, parallel: object) -> object: ...


PRESET = """\
name: toy
model:
  dim: 16
  vocab_size: 32
  block:
    attention: {use: wide, n_heads: 2}
    feedforward:
      use: sparse
      n_experts: 4
      router: {use: toy_top}
      balancer: {use: toy_free, speed: [{until: 14.3e12, value: 0.001}, {value: 0.0}]}
  blocks:
    - repeat: 1
      feedforward: {use: dense}
    - {repeat: 3}
objectives:
  guess: {}
precision: {use: toy}
data: {use: toy}
guard: {use: toy}
observers: {blind: {}}
optimizer: {use: toy}
parallel: {pipeline: {use: toy}, sharding: {use: toy}}
train:
  tokens: 14.8e12
  sequence_length: 8
  batch_sequences: 4
  lr: [{until_step: 20, from: 0.0, to: 1e-3, shape: linear}, {value: 1e-3}]
"""


def plugins() -> Plugins:
    """Plugins with the toys and nothing else."""
    found = Plugins()
    found.registry.collect(sys.modules[__name__], "toys")
    return found


def resolved(folder: Path, *overrides: str, replace: Mapping[str, str] | None = None, text: str = PRESET) -> Resolved:
    """Write a preset with replacements to `folder`, and resolve it."""
    for old, new in (replace or {}).items():
        assert old in text
        text = text.replace(old, new)
    (folder / "toy.yaml").write_text(text, encoding="utf-8", newline="")
    return resolve(folder / "toy.yaml", overrides, plugins())


def line_of(part: str) -> int:
    """The line of the toy preset in which `part` first stands."""
    return PRESET[: PRESET.index(part)].count("\n") + 1


counts = st.integers(1, 2**53)
numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(codec="utf-8"), max_size=8) | st.text("?@-:#&*!|>%'\"[]{}, a0\n", max_size=8)
names = st.text("abc_", min_size=1, max_size=4) | st.text("?@-:#'a0 ", min_size=1, max_size=4)
routers = st.builds(TopK, top_k=st.just(1))
attentions = st.builds(
    Wide,
    n_heads=counts,
    scale=numbers,
    betas=st.tuples(numbers, numbers),
    mode=st.sampled_from(["plain", "fancy"]),
    rank=st.none() | st.integers(-(2**63), 2**63 - 1),
) | st.builds(Narrow, window=st.integers(-5, 5))
feedforwards = st.builds(Dense, hidden=counts) | st.builds(
    Sparse,
    n_experts=counts,
    router=routers,
    balancer=st.none() | st.builds(Free, speed=curves()),
    sizes=st.lists(st.integers(), max_size=3).map(lambda sizes: tuple(size % 2**60 for size in sizes)),
)
objectives = st.dictionaries(names, st.builds(Guess, weight=curves()) | st.builds(Balance, weight=curves()), max_size=2)
rows = st.builds(Rows, files=st.lists(words, min_size=1, max_size=3).map(tuple), shuffle=st.booleans())

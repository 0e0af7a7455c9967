"""What the strategies draw is valid, reaches the edges, and repeats with its seed."""

from typing import Literal

import pytest
import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, in_, le, lt, optional
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from tangram.core import load_preset
from tangram.core.context import Context
from tangram.core.curve import Curve, Ramp
from tangram.core.records import IGNORE, Batch, Routing
from tangram.testing import assert_close, batches, configs, contexts, curves, hidden, presets, routings

SEARCH = settings(max_examples=2000, database=None, derandomize=True, phases=[Phase.generate])


@frozen(kw_only=True)
class Inner:
    width: int = field(validator=gt(0))
    kind: str = field(default="a", validator=in_(("a", "b")))


@frozen(kw_only=True)
class Outer:
    heads: int = field(validator=[ge(3), le(5)])
    open: int = field(validator=and_(gt(0), gt(2)))
    rate: float = field(default=0.5, validator=and_(gt(0.0), lt(1.0)))
    share: float = field(default=0.5, validator=[ge(0.0), le(1.0)])
    rank: int | None = field(default=None, validator=optional(ge(7)))
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    flag: bool = False
    below: int = field(default=0, validator=lt(0.5))
    note: str = ""
    curve: Curve = field(default=Curve.constant(3.0))
    needed: Curve
    kept: tuple[int, ...] = (1, 2)
    inner: Inner
    _private: int = field(default=1, validator=gt(0))


@given(drawn=configs(Outer))
def test_configs_draw_fields_and_keep_defaults_of_other_types(drawn: Outer) -> None:
    assert 3 <= drawn.heads <= 5
    assert drawn.curve == Curve.constant(3.0)
    assert drawn.kept == (1, 2)
    assert drawn.inner.width > 0


def test_bounds_are_read_so_well_that_nothing_is_refused() -> None:
    attempts, accepted = [], []

    @frozen(kw_only=True)
    class Bounded:
        half_open: int = field(validator=[gt(40), le(42)])
        other_half: int = field(validator=[ge(40), lt(42)])
        narrowed: int = field(validator=[gt(2), ge(1), le(9), lt(7), le(8)])
        fraction: int = field(validator=[gt(0.5), lt(3.5)])
        unit: float = field(validator=and_(gt(0.0), lt(1.0)))
        closed: float | None = field(validator=optional([ge(-1.0), le(1.0)]))

        def __new__(cls, **values: object) -> "Bounded":
            attempts.append(values)
            return object.__new__(cls)

        def __attrs_post_init__(self) -> None:
            accepted.append(self)

    @settings(max_examples=150, database=None, derandomize=True)
    @given(drawn=configs(Bounded))
    def draw(drawn: Bounded) -> None:
        pass

    draw()
    assert len(attempts) == len(accepted)
    assert {drawn.half_open for drawn in accepted} == {41, 42}
    assert {drawn.other_half for drawn in accepted} == {40, 41}
    assert {drawn.narrowed for drawn in accepted} == {3, 4, 5, 6}
    assert {drawn.fraction for drawn in accepted} == {1, 2, 3}
    assert None in {drawn.closed for drawn in accepted}


@pytest.mark.parametrize(
    "reached",
    [
        lambda c: c.heads == 3,
        lambda c: c.heads == 5,
        lambda c: c.open > 10,
        lambda c: c.share == 1.0,
        lambda c: c.rank is None,
        lambda c: c.rank is not None and c.rank > 7,
        lambda c: c.score == "softmax",
        lambda c: c.flag,
        lambda c: c.below < -1,
        lambda c: len(c.note) > 1,
        lambda c: c.inner.kind == "b",
        lambda c: c._private > 1,
        lambda c: len(c.needed.pieces) > 1,
    ],
)
def test_configs_reach_every_kind_of_value(reached) -> None:
    find(configs(Outer), reached, settings=SEARCH)


def test_a_class_that_refuses_combinations_draws_the_others() -> None:
    @frozen
    class Pair:
        small: int = field(validator=ge(0))
        large: int = field(validator=ge(0))

        def __attrs_post_init__(self) -> None:
            if self.small > self.large:
                raise ValueError("small must not exceed large")

    @given(drawn=configs(Pair))
    def draw(drawn: Pair) -> None:
        assert drawn.small <= drawn.large

    draw()


def test_configs_say_what_they_cannot_draw() -> None:
    @frozen
    class Opaque:
        thing: object

    def draw(overrides: dict[str, st.SearchStrategy[object]]) -> object:
        only = settings(max_examples=1, database=None)
        return find(configs(Opaque, overrides), lambda drawn: True, settings=only)

    with pytest.raises(TypeError, match=r"Opaque\.thing is required, .* overrides"):
        draw({})
    with pytest.raises(TypeError, match="Opaque has no field thong"):
        draw({"thong": st.none()})
    assert draw({"thing": st.just(4)}) == Opaque(4)


@given(batch=batches(11))
def test_batches_are_packed_as_records_promise(batch: Batch) -> None:
    assert batch.targets is not None
    shape = batch.tokens.shape
    assert shape == batch.targets.shape == batch.positions.shape == batch.segments.shape
    assert all(t.dtype == torch.int64 for t in (batch.tokens, batch.targets, batch.positions, batch.segments))
    assert int(batch.tokens.min()) >= 0
    assert int(batch.tokens.max()) < 11
    assert batch.n_sequences == shape[0]
    assert batch.n_targets == int((batch.targets != IGNORE).sum()) > 0


@settings(max_examples=200)
@given(batch=batches(3, isolated=True, sequences=1, length=3))
def test_a_batch_always_has_a_target(batch: Batch) -> None:
    assert batch.n_targets > 0


@given(batch=batches(50))
def test_targets_are_the_next_tokens_of_their_own_segment(batch: Batch) -> None:
    assert batch.targets is not None
    same = batch.segments[:, :-1] == batch.segments[:, 1:]
    targets = batch.targets[:, :-1]
    known = targets != IGNORE
    assert torch.equal(targets[known], batch.tokens[:, 1:][known])
    assert not bool((known & ~same).any())


@given(batch=batches(50, isolated=True))
def test_isolated_segments_count_up_and_restart_positions(batch: Batch) -> None:
    steps, moves = batch.segments.diff(dim=1), batch.positions.diff(dim=1)
    assert set(steps.flatten().tolist()) <= {0, 1}
    assert torch.equal(moves == 1, steps == 0)
    assert not bool(batch.positions[:, 1:][steps == 1].any())
    assert not bool(batch.positions[:, 0].any() | batch.segments[:, 0].any())


@given(batch=batches(50, isolated=False, sequences=2, length=st.just(5)))
def test_open_rows_are_one_segment(batch: Batch) -> None:
    assert torch.equal(batch.positions, torch.arange(5).repeat(2, 1))
    assert not bool(batch.segments.any())


@pytest.mark.parametrize(
    "reached",
    [
        lambda b: bool(b.segments.any()),
        lambda b: len(b.tokens) > 1 and not bool(b.segments.any()),
        lambda b: bool((b.targets[-1, -2:] == IGNORE).all()),
        lambda b: b.n_targets == 1,
        lambda b: int(b.segments[0, -1]) != int(b.segments[-1, -1]),
    ],
)
def test_batches_reach_every_kind_of_packing(reached) -> None:
    find(batches(9), reached, settings=SEARCH)


@given(drawn=hidden(st.integers(1, 3), 40, 50, dtype=torch.float64, scale=3.0))
def test_hidden_states_have_their_shape_and_scale(drawn: torch.Tensor) -> None:
    assert 1 <= drawn.shape[0] <= 3
    assert drawn.shape[1:] == (40, 50)
    assert drawn.dtype == torch.float64
    assert 2.5 < float(drawn.std()) < 3.5


def test_hidden_states_repeat_with_their_draws() -> None:
    def smallest() -> torch.Tensor:
        return find(hidden(1, 2, 3), lambda _: True, settings=settings(database=None, derandomize=True))

    assert torch.equal(smallest(), smallest())


@given(curve=curves(0.25, 2.0))
def test_curves_keep_to_their_values(curve: Curve) -> None:
    for piece in curve.pieces:
        ends = (piece.start, piece.stop) if isinstance(piece, Ramp) else (piece.value,)
        assert all(0.25 <= end <= 2.0 for end in ends)
    assert Curve.parse(curve.dump()) == curve


@pytest.mark.parametrize(
    "reached",
    [
        lambda c: len(c.pieces) == 1,
        lambda c: isinstance(c.pieces[0], Ramp) and c.pieces[0].until.unit == "steps",
        lambda c: {p.until.unit for p in c.pieces[:-1]} == {"tokens", "steps"},
        lambda c: any(isinstance(p, Ramp) and p.shape == "cosine" for p in c.pieces[1:]),
    ],
)
def test_curves_reach_every_kind_of_piece(reached) -> None:
    find(curves(), reached, settings=SEARCH)


@settings(max_examples=10)
@given(arguments=presets(most=2))
def test_presets_are_what_load_preset_takes(arguments: tuple[str, ...]) -> None:
    assert load_preset(*arguments).name == arguments[0]
    assert len(arguments) <= 3


@pytest.mark.parametrize(
    "reached",
    [
        lambda p: len(p) == 1,
        lambda p: len(p) == 5,
        lambda p: any('{"use": ' in override for override in p),
        lambda p: any(override.startswith("objectives.") and override.endswith("=null") for override in p),
    ],
)
def test_presets_reach_every_kind_of_override(reached) -> None:
    find(presets(), reached, settings=SEARCH)


@given(routing=routings(st.integers(1, 6)))
def test_routings_are_what_a_router_may_return(routing: Routing) -> None:
    ids, stats = routing.ids, routing.stats
    assert all(len(set(row)) == ids.shape[1] for row in ids.tolist())
    assert torch.equal(stats.ids.flatten(0, 1), ids)
    assert stats.load.sum(1).eq(stats.top.sum(1)).all()
    assert int(stats.load.sum()) == ids.numel()
    assert_close(stats.affinity.sum(1), torch.ones(len(stats.ids), dtype=torch.float64), length=12)
    assert bool((routing.gates > 0).all())


@pytest.mark.parametrize(
    "reached",
    [
        lambda r: r.ids.shape[1] == r.stats.load.shape[1] > 1,
        lambda r: not bool(r.stats.load.sum(0).all()),
        lambda r: not torch.equal(r.stats.load, r.stats.top),
        lambda r: r.stats.load.shape[1] > r.ids.shape[1] and bool((r.ids == r.ids[0]).all()) and len(r.ids) > 4,
    ],
    ids=["every expert", "an empty expert", "a bias that chose", "all tokens alike"],
)
def test_routings_reach_the_edges(reached) -> None:
    find(routings(st.integers(1, 6)), reached, settings=SEARCH)


@given(ctx=contexts(st.integers(1, 8)))
def test_contexts_build_layers(ctx: Context) -> None:
    assert 0 <= ctx.layer < ctx.n_layers
    with ctx.recompute.scope():
        assert ctx.linear(ctx.dim, 3)(torch.ones(2, ctx.dim, dtype=torch.float64)).dtype is torch.float64

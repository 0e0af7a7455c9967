"""Who holds what, over every small layout."""

from collections import Counter

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from pipeline_at_work import PIPELINES

from tangram.core.layout import Layout


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Return the layout of the first rank of a run with any pipeline."""
    pipeline = draw(st.sampled_from(list(PIPELINES.values())))
    ranks = draw(st.sampled_from((2, 4, 6)))
    experts = draw(st.integers(1, 4))
    place = pipeline.schedule(ranks, 2 * ranks).place
    return Layout(place, experts * draw(st.integers(1, 3)), experts)


def everyone(layout: Layout) -> list[Layout]:
    return [evolve(layout, rank=rank) for rank in range(layout.ranks)]


@given(layouts())
def test_every_rank_is_one_place(layout: Layout) -> None:
    places = [(each.pipeline_rank, each.data_rank) for each in everyone(layout)]
    assert len(set(places)) == len(places) == layout.ranks
    assert all(each.at(each.pipeline_rank) == each.rank for each in everyone(layout))
    for each in everyone(layout):
        pipeline = [evolve(layout, rank=rank) for rank in each.pipeline]
        assert [other.pipeline_rank for other in pipeline] == list(range(layout.pipeline_ranks))
        assert {other.data_rank for other in pipeline} == {each.data_rank}


@given(layouts(), st.data())
def test_all_who_hold_a_parameter_agree_on_who_they_are(layout: Layout, data: st.DataObject) -> None:
    stages = data.draw(st.sets(st.integers(0, layout.n_stages - 1), min_size=1, max_size=2))
    for expert in (False, True):
        for each in everyone(layout):
            holders = each.holders(stages, expert)
            assert list(holders) == sorted(set(holders))
            if each.stages & stages:
                assert each.rank in holders
                assert all(evolve(layout, rank=other).holders(stages, expert) == holders for other in holders)


@given(layouts(), st.integers(1, 4))
def test_each_expert_of_a_stage_is_held_as_often_as_any(layout: Layout, each_has: int) -> None:
    n = each_has * layout.expert_ranks
    for stage in range(layout.n_stages):
        held = Counter(expert for each in everyone(layout) if stage in each.stages for expert in each.share(n))
        copies = len(layout.holders([stage], expert=True))
        assert held == Counter(dict.fromkeys(range(n), copies))


@given(layouts())
def test_those_who_share_out_experts_have_the_same_stages_and_every_share_once(layout: Layout) -> None:
    for each in everyone(layout):
        peers = [evolve(layout, rank=rank) for rank in each.experts]
        assert each.rank in each.experts
        assert {peer.stages for peer in peers} == {each.stages}
        assert [peer.expert_rank for peer in peers] == list(range(layout.expert_ranks))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="6 data ranks are no multiple of 4 expert ranks"):
        Layout(data_ranks=6, expert_ranks=4)
    with pytest.raises(ValueError, match="there is no rank 2 of 2"):
        Layout(data_ranks=2, rank=2)
    with pytest.raises(ValueError, match="5 experts cannot be shared out evenly among 2 expert ranks"):
        Layout(data_ranks=2, expert_ranks=2).share(5)

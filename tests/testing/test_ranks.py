"""Functions in several processes: their results in order, their errors, and nobody left behind."""

import multiprocessing

import pytest
from ranks_at_work import dying, failing, hanging, summed

from tangram.testing.ranks import RankError, run_ranks


def test_results_come_in_the_order_of_the_ranks_which_talk_to_each_other_and_have_one_thread() -> None:
    found = run_ranks(summed, 2, 2.0)
    assert [value.item() for value, _ in found] == [6.0, 7.0]
    assert [threads for _, threads in found] == [1, 1]
    assert not multiprocessing.active_children()


def test_what_a_rank_raises_is_raised_with_its_traceback_and_stops_the_others() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1: Traceback.*in failing.*ValueError: rank 1 has had enough"):
        run_ranks(failing, 2, 1)
    assert not multiprocessing.active_children()


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="rank 0: its process ended with exit code 7"):
        run_ranks(dying, 1, 0)


def test_a_rank_that_hangs_is_given_up() -> None:
    with pytest.raises(RankError, match=r"no answer from rank 0 within 0\.5 s"):
        run_ranks(hanging, 1, 0, timeout=0.5)
    assert not multiprocessing.active_children()


def test_what_cannot_be_sent_to_a_rank_is_refused_before_one_is_started() -> None:
    with pytest.raises(Exception, match="pickle"):
        run_ranks(lambda rank: rank, 2)

"""Ranks that are started again meet in the store in which those that died had met."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from tangram.core import launch
from tangram.core.session import RunError

RANKS = 4


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(launch, "_ASKING", 0.01)


def met(store, first_late: bool = False) -> list[int]:
    """Return what each rank is told; the first comes last if it is late."""
    with ThreadPoolExecutor(RANKS) as pool:
        order = list(range(RANKS))[::-1] if first_late else range(RANKS)
        told = {rank: pool.submit(launch.meet, store, rank, RANKS) for rank in order}
        return [told[rank].result(timeout=20) for rank in range(RANKS)]


def test_all_ranks_of_a_life_are_told_the_same_number_and_each_life_another():
    store = HashStore()
    assert [met(store, first_late) for first_late in (False, True, True, False)] == [[n] * RANKS for n in range(4)]


def test_a_life_that_ended_while_its_ranks_met_does_not_count_for_the_next():
    store = HashStore()
    assert met(store) == [0] * RANKS
    store.add("meetings", 1)  # the first rank called a meeting and died
    store.set("meeting 2/3", "one who died")
    assert met(store, first_late=True) == [2] * RANKS


def test_who_comes_before_the_first_rank_waits_for_it():
    store = HashStore()
    assert met(store) == [0] * RANKS
    told: list[int] = []
    early = threading.Thread(target=lambda: told.append(launch.meet(store, 3, RANKS)))
    early.start()
    early.join(0.2)
    assert not told, "what was called in another life is no answer"
    with ThreadPoolExecutor(RANKS) as pool:
        assert list(pool.map(lambda rank: launch.meet(store, rank, RANKS), range(3))) == [1] * 3
    early.join(20)
    assert told == [1]


def test_more_processes_than_gpus_are_refused_before_one_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match="2 processes, and this machine has 1 GPU: start one for each"):
        launch.launch(["train", "v3-tiny"], 2)

"""Runs a function in several processes of this machine that talk through gloo: how laws about ranks are tried."""

import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed import FileStore  # type: ignore[attr-defined]

_T = TypeVar("_T")


class RankError(Exception):
    """A rank raised, died, or did not answer in time; the message names it and holds its traceback."""


def _spawning() -> ForkServerContext:
    """Return what starts ranks: forked from a process that has imported what they need, in a tenth of a second each."""
    context = get_context("forkserver")
    imported_by_backward = "torch.fx.experimental.symbolic_shapes"
    context.set_forkserver_preload(["torch", "tangram.core.model", imported_by_backward, __package__])
    return context


def prepare_ranks() -> None:
    """Begin to start the process that ranks are forked from, so that the first of them wait less for its imports."""
    _spawning()
    ensure_running()


def run_ranks(fn: Callable[..., _T], n: int, *args: object, timeout: float = 300.0) -> list[_T]:
    """Call `fn(rank, *args)` in n processes of one thread each, and return the results in the order of the ranks.

    The processes are one gloo group, the default one of `torch.distributed`. They are gone when this returns or
    raises, and end by themselves should this process be killed.

    Args:
        fn: A function at the top of a module that can be imported.
        n: Ranks.
        *args: Its further arguments, which can be pickled, as can what it returns.
        timeout: Seconds after which ranks that have not answered are given up.

    Raises:
        RankError: The first error of a rank, with its traceback; or ranks did not answer in time.
    """
    call = pickle.dumps((fn, args))
    spawning = _spawning()
    found: dict[int, _T]
    ranks: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for rank in range(n):
                mine, theirs = spawning.Pipe(duplex=False)
                settings = (rank, n, str(Path(folder, "store")), timeout, call, theirs)
                started = spawning.Process(target=_work, args=settings, name=f"rank-{rank}", daemon=True)
                started.start()
                theirs.close()
                ranks[mine] = (rank, started)
            found = _collect(ranks, time.monotonic() + timeout, timeout)
        return [found[rank] for rank in range(n)]
    finally:
        for connection, (_, process) in ranks.items():
            process.kill()
            process.join()
            connection.close()


def _collect(ranks: dict[Connection, tuple[int, BaseProcess]], deadline: float, timeout: float) -> dict[int, _T]:
    """Return the results by rank.

    Raises:
        RankError: One has none.
    """
    waiting, found = dict(ranks), dict[int, _T]()
    while waiting:
        ready = [each for each in wait(list(waiting), max(0.0, deadline - time.monotonic())) if each in waiting]
        if not ready:
            silent = ", ".join(str(rank) for rank, _ in waiting.values())
            raise RankError(f"no answer from rank {silent} within {timeout:g} s")
        errors = []
        for connection in ready:
            assert isinstance(connection, Connection)
            rank, process = waiting.pop(connection)
            try:
                when, error, result = pickle.loads(connection.recv_bytes())
            except EOFError:
                process.join()
                when, error, result = time.monotonic(), f"its process ended with exit code {process.exitcode}", None
            found[rank] = result
            if error:
                errors.append((when, rank, error))
        if errors:  # one that fails breaks the connections of the others: the first is the cause
            _, rank, error = min(errors)
            raise RankError(f"rank {rank}: {error}")
    return found


def _work(rank: int, n: int, store: str, timeout: float, call: bytes, answer: Connection) -> None:
    """Be one rank."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        fn, args = pickle.loads(call)
        limit = timedelta(seconds=timeout)
        distributed.init_process_group("gloo", store=FileStore(store, n), rank=rank, world_size=n, timeout=limit)
        answer.send_bytes(pickle.dumps((time.monotonic(), "", fn(rank, *args))))
    except BaseException:
        answer.send_bytes(pickle.dumps((time.monotonic(), traceback.format_exc(), None)))
        raise SystemExit(1) from None
    with suppress(RuntimeError):  # once all have answered, the parent ends who is not through yet
        distributed.barrier()  # whoever leaves first would break the connection of those that still read from it
    distributed.destroy_process_group()


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)

"""Runs on several ranks: how they are started, and how a process finds out which of them it is."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType
from uuid import uuid4

import torch
from torch import distributed
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from tangram.core.assembly import Seat, alone
from tangram.core.process import own_device
from tangram.core.session import RunError
from tangram.core.terminal import FAILED, KILLED, OK, STOPPED

_RESTARTS = 5
"""How often all ranks are started again after one of them died."""

_PARTING = timedelta(seconds=20)
"""How long a rank that ends waits for the others to end as well."""

_ASKING = 0.2
"""Seconds between two questions whether all have met."""

_SAVING = 600
"""Seconds that ranks which were told to stop have, to finish their step and save."""

_UNREAD = 5.0
"""Seconds after which a rank that was told to stop no longer waits for the agent to read its exit code."""


def take_seat() -> Seat:
    """Return which rank this process is, by what torchrun told it, and join the others; alone where it told nothing.

    Raises:
        RunError: The processes of this machine are more than its GPUs.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return alone()
    _have_a_gpu_each(int(os.environ["LOCAL_WORLD_SIZE"]))
    device = own_device(int(os.environ["LOCAL_RANK"]))
    if device.type != "cpu":
        # Streams that share a queue of the device wait for each other: for a message, it may be for ever.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        torch.cuda.set_device(device)
    store, rank, ranks = next(rendezvous("env://"))
    meetings = meet(store, rank, ranks)
    store = PrefixStore(f"after {meetings}", store)
    # Told its device, NCCL would put all messages of a group in one queue: channels count on one for each two ranks.
    distributed.init_process_group("gloo" if device.type == "cpu" else "nccl", store=store, rank=rank, world_size=ranks)
    return Seat(rank, ranks, device, max(meetings, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))


def _have_a_gpu_each(processes: int) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else processes
    if gpus < processes:
        raise RunError(
            f"{processes} processes, and this machine has {gpus} GPU{'s' * (gpus != 1)}: start one for each, or set "
            "CUDA_VISIBLE_DEVICES to nothing so that they compute on the CPU"
        )


def meet(store: Store, rank: int, ranks: int) -> int:
    """Return how often the ranks met before in this store, once all that live now have met.

    A store outlives ranks that died: who is started again must not read where they listened, and wait there. And the
    agents of several machines do not count restarts alike. So the first rank numbers the meeting, and the others ask
    until one is called in which their own name is read out.
    """
    if rank == 0:
        number: int = store.add("meetings", 1)
        names = [store.get(f"meeting {number}/{other}").decode() for other in range(1, ranks)]
        store.set(f"meeting {number}", " ".join(names))
        return number - 1
    mine, called = uuid4().hex, ""
    while mine not in called:  # if the first rank never comes, the agent ends this one
        number = store.add("meetings", 0)
        store.set(f"meeting {number}/{rank}", mine)
        time.sleep(_ASKING)
        called = store.get(f"meeting {number}").decode() if store.check([f"meeting {number}"]) else ""
    return number - 1


def leave(code: int, why: str = "") -> int:
    """Part from the other ranks, having said why, and return the code.

    The first rank speaks at once, and another one only if it says something else. A rank that alone has something to
    tell ends its process, so that the others do not wait for it.
    """
    joined = distributed.is_initialized()
    rank, told = distributed.get_rank() if joined else 0, [""]
    if rank == 0 and why:
        print(why, file=sys.stderr, flush=True)
    others_go_on = False
    if code != OK and joined:
        told *= distributed.get_world_size()
        try:
            distributed.monitored_barrier(timeout=_PARTING)  # only gloo has one
            distributed.all_gather_object(told, why)
        except RuntimeError:
            others_go_on = True
    if rank > 0 and why and why not in told[:rank]:
        print(why, file=sys.stderr, flush=True)
    if others_go_on:
        sys.stderr.flush()
        os._exit(code)
    return code


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run the command line `arguments` in `nproc` processes under torchrun's agent; return the exit code.

    If a process dies, all are started again and go on from the last checkpoint.

    Raises:
        RunError: They are more than this machine's GPUs.
    """
    _have_a_gpu_each(nproc)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVING))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=_RESTARTS,
        monitor_interval=0.2,
        start_method="spawn",
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
    )
    signal.signal(signal.SIGINT, _ask_to_stop)
    try:
        codes: dict[int, int] = elastic_launch(config, _work)(list(arguments))
    except SignalException:
        return STOPPED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} died {_RESTARTS + 1} times (exit code {failure.exitcode})", file=sys.stderr)
        return FAILED
    return max(codes.values())


def _ask_to_stop(number: int, frame: FrameType | None) -> None:
    """Have the agent ask all ranks to save; a second Ctrl-C ends this process at once, and they end with it."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(KILLED))
    os.kill(os.getpid(), signal.SIGTERM)


def _work(arguments: list[str]) -> int:
    """Be one rank."""
    from tangram.core.cli import main

    os.setpgid(0, 0)  # so that the terminal's Ctrl-C reaches the agent alone, and does not count twice
    code = OK
    try:
        main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    if code == STOPPED:  # an agent that was told to stop itself reads no exit code: it would wait, then kill
        parting = threading.Timer(_UNREAD, os._exit, (code,))
        parting.daemon = True
        parting.start()
    return code

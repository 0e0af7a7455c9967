"""A network with NCCL's manners on CPUs, on which ranks that would wait for each other for ever raise.

Collectives are gloo's. What two ranks of a group send each other goes as over a `ProcessGroupNCCL` that was not told
its device:

* The first send or receive waits until the other one of the two makes its first in this group.
* Sends and receives of the two in this group, both ways, run one after the other, as they were asked for.
* A send ends when the receive of the other side runs (gloo's own do).
* Tags are not heeded.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import torch
from accelerator import each_tensor
from torch import Tensor, distributed
from torch.distributed import Backend, PrefixStore, ProcessGroup, ProcessGroupGloo, Store
from torch.distributed.distributed_c10d import _get_default_store

# Names that torch 2.13 calls, by those of gloo.
_RENAMED = {
    "_allgather_base": "all_gather_single",
    "_reduce_scatter_base": "reduce_scatter_single",
    "alltoall_base": "all_to_all_single",
}
_COLLECTIVES = ("allgather", "allreduce", "barrier", "broadcast", "reduce", *_RENAMED)


class StuckError(RuntimeError):
    """Something waited for longer than the network's patience."""


class Asked:
    """A send or a receive that was asked for; waiting for it waits, as a stream of a GPU would."""

    def __init__(self, what: str, patience: float, done: Future[None]) -> None:
        self._what, self._patience, self._done = what, patience, done

    def wait(self) -> bool:
        try:
            self._done.result(self._patience)
        except TimeoutError:
            raise StuckError(f"the {self._what} did not end") from None
        return True


class StrictGroup(ProcessGroup):
    """The group of processes; its collectives are those of the gloo group inside.

    Args:
        store: Where the group meets.
        rank: Which of the group this is.
        size: Its ranks.
        timeout: Of gloo.
        patience: Seconds after which a wait of two ranks for each other raises.
        device: The type of the only device whose tensors it takes.
        seen: Returns a CPU's tensor over the bytes of one that is sent.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: timedelta,
        patience: float,
        device: str,
        seen: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(rank, size)
        self._store, self._patience, self._seen = store, patience, seen
        self._queues: dict[int, ThreadPoolExecutor] = {}
        self._set_default_backend(ProcessGroup.BackendType.GLOO)
        self._gloo = ProcessGroupGloo(PrefixStore("gloo", store), rank, size, timeout)
        self._gloo._set_sequence_number_for_group()
        self._register_backend(torch.device(device), ProcessGroup.BackendType.GLOO, self._gloo)
        # Asked straight: the ways through a Python class hold the interpreter's lock, and may wait for gloo's threads,
        # which wait for that lock.
        for name in _COLLECTIVES:
            setattr(self, _RENAMED.get(name, name), partial(self._together, getattr(self._gloo, name)))

    def _together(self, act: Callable[..., distributed.Work], *args: object, **kwargs: object) -> distributed.Work:
        return act(*(each_tensor(self._seen, arg) for arg in args), **kwargs)

    def send(self, tensors: list[Tensor], target: int, tag: int) -> Asked:
        return self._ask(f"send from {self.rank()} to {target}", target, self._gloo.send, tensors)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Asked:
        return self._ask(f"receive of {self.rank()} from {source}", source, self._gloo.recv, tensors)

    def _ask(self, what: str, other: int, act: Callable[..., distributed.Work], tensors: list[Tensor]) -> Asked:
        if other not in self._queues:
            self._meet(other)
            self._queues[other] = ThreadPoolExecutor(1)
        seen = [self._seen(tensor) for tensor in tensors]
        return Asked(what, self._patience, self._queues[other].submit(lambda: act(seen, other, 0).wait()))

    def _meet(self, other: int) -> None:
        self._store.set(f"{self.rank()} turned to {other}", "")
        try:
            self._store.wait([f"{other} turned to {self.rank()}"], timedelta(seconds=self._patience))
        except distributed.DistStoreError:
            raise StuckError(f"{self.rank()} turned to {other} and {other} not to {self.rank()}") from None


def join(patience: float, device: str = "cpu", seen: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    """Have the default group, and all that are made from now on, be of this network; all ranks must call this at once.

    Args:
        patience: Seconds after which a wait of two ranks for each other raises.
        device: The type of the only device whose tensors it takes.
        seen: Returns a CPU's tensor over the bytes of one that is sent.
    """
    rank, ranks, store = (
        distributed.get_rank(),
        distributed.get_world_size(),
        PrefixStore("strict", _get_default_store()),
    )
    distributed.barrier()  # whoever leaves while others still meet would break their connection
    distributed.destroy_process_group()
    Backend.register_backend("strict", lambda *group: StrictGroup(*group, patience, device, seen), devices=[device])
    distributed.init_process_group("strict", store=store, rank=rank, world_size=ranks)

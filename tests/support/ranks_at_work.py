"""What ranks do in the tests of `run_ranks`: they are imported by its processes."""

import os
import time

import torch
from torch import distributed


def summed(rank: int, factor: float) -> tuple[torch.Tensor, int]:
    """Return the sum over all ranks of factor times their number, and the threads of this one."""
    value = torch.tensor([factor * (rank + 1)])
    distributed.all_reduce(value)
    return value + rank, torch.get_num_threads()


def failing(rank: int, bad: int) -> None:
    """Wait for a rank that raises."""
    if rank == bad:
        raise ValueError(f"rank {rank} has had enough")
    distributed.barrier()


def dying(rank: int, bad: int) -> None:
    """Wait for a rank that dies without a word."""
    if rank == bad:
        os._exit(7)
    distributed.barrier()


def hanging(rank: int, bad: int) -> int:
    """Return, but one rank."""
    if rank == bad:
        time.sleep(600)
    return rank

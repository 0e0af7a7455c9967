"""What a rank holds under each sharding, and what rows that must be put together cost a step.

    python benchmarks/sharding.py [--rounds 7] [--sequences 8]

* Memory: v3-tiny with AdamW, on 1, 2 and 4 data ranks that talk through gloo, after a step of one micro-batch for each:
  the bytes of parameters, of their gradients once they are summed, and of optimizer states, of the rank that has most;
  and of parameters the most that were there when any module was called.
* Speed: steps of `--sequences` sequences of 256 tokens on two processes, zero1 and fsdp in turn, in micro-batches of
  one sequence and of as many as a rank has. Tokens per second, and CPU seconds of both processes: medians, smallest
  and largest in brackets.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed, nn

from tangram.core import load_preset
from tangram.core.assembly import Seat, assemble, sequences_at
from tangram.core.experiment import Experiment
from tangram.core.process import settle
from tangram.core.step import Trainer, train_step
from tangram.testing import run_ranks

SHARDINGS = ("replicate", "zero1", "fsdp")
RANKS = (1, 2, 4)
MIB = 2**20


def experiment(sharding: str, sequences: int, micro: int = 1) -> Experiment:
    return load_preset(
        "v3-tiny",
        "optimizer={use: adamw}",
        "data={use: synthetic}",
        f"train={{sequence_length: 256, micro_sequences: {micro}, batch_sequences: {sequences}}}",
        f"parallel.sharding={{use: {sharding}}}",
    )


def step(run: Trainer) -> None:
    batch = run.data.batch(run.progress, sequences_at(run.experiment, run.progress, run.parallel.layout.data_ranks))
    train_step(run, batch)


def held(rank: int, ranks: int) -> list[tuple[int, int, int, int]]:
    """Return for each sharding the bytes of parameters, the most of them, of gradients and of optimizer states."""
    return [_held(rank, ranks, sharding) for sharding in SHARDINGS]


def _held(rank: int, ranks: int, sharding: str) -> tuple[int, int, int, int]:
    run = assemble(experiment(sharding, ranks), Seat(rank, ranks))
    gc.collect()
    parameters = [each for each in gc.get_objects() if issubclass(type(each), nn.Parameter)]
    gradients = [0]
    most = [_bytes(parameters)]

    def look(*_: object) -> None:
        most.append(_bytes(parameters))

    def reduce(sums=run.executor._reduce) -> None:
        sums()
        gradients.append(_bytes([each.grad for each in parameters if each.grad is not None]))

    hooks = [module.register_forward_hook(look) for module in run.model.modules()]
    run.executor._reduce = reduce
    step(run)
    for hook in hooks:
        hook.remove()
    states = [value for state in run.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return _bytes(parameters), max(most), max(gradients), _bytes(states)


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the tensors' memory, what they share once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def timed(rank: int, ranks: int, rounds: int, sequences: int, micro: int) -> dict[str, list[tuple[float, float]]]:
    """Return seconds and CPU seconds of each round's step under each sharding, which take turns."""
    settle()
    runs = {name: assemble(experiment(name, sequences, micro), Seat(rank, ranks)) for name in ("zero1", "fsdp")}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items() if number % 2 else reversed(runs.items()):
            distributed.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            step(run)
            distributed.barrier()
            if number:  # the first warms up
                found[name].append((time.perf_counter() - began, time.process_time() - cpu))
    return found


def _said(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "MiB of a rank: parameters between steps (the most in a step), gradients, optimizer states, sum between steps"
    )
    for ranks in RANKS:
        per_rank = [held(0, 1)] if ranks == 1 else run_ranks(held, ranks, ranks)
        for name, each in zip(SHARDINGS, zip(*per_rank, strict=True), strict=True):
            parameters, most, gradients, states = (max(values) / MIB for values in zip(*each, strict=True))
            total = parameters + states
            line = f"{parameters:6.1f} ({most:5.1f}) {gradients:6.1f} {states:6.1f} {total:6.1f}"
            print(f"{ranks} ranks {name:10} {line}")
    for micro in (1, asked.sequences // 2):
        print(f"micro-batches of {micro} sequences")
        report(run_ranks(timed, 2, 2, asked.rounds, asked.sequences, micro), asked.sequences * 256)


def report(rounds: Sequence[Mapping[str, Sequence[tuple[float, float]]]], tokens: int) -> None:
    """Print what the ranks timed, a step being as long as on the slowest."""
    figures = {}
    for name in rounds[0]:
        seconds = [max(each[0] for each in both) for both in zip(*(found[name] for found in rounds), strict=True)]
        cpu = [sum(each[1] for each in both) for both in zip(*(found[name] for found in rounds), strict=True)]
        figures[name] = seconds, cpu
        print(f"{name}: {_said([tokens / s for s in seconds], '.0f')} tokens/s, {_said(cpu, '.2f')} CPU s a step")
    for what, place in (("time", 0), ("CPU time", 1)):
        ratios = [a / b for a, b in zip(figures["fsdp"][place], figures["zero1"][place], strict=True)]
        print(f"{what} of fsdp over that of zero1: {_said(ratios, '.2f')}")


if __name__ == "__main__":
    main()

"""What a training step in FP8 costs on a CPU, against one in bfloat16, with a C++ compiler and without.

    python benchmarks/fp8_cost.py [--preset v3-tiny] [--rounds 7]

A process a side takes a step of the preset in turn, at one thread; printed are CPU seconds and the ratio to bfloat16,
round by round.
"""

import argparse
import multiprocessing
import os
import statistics
import time
import warnings
from multiprocessing.connection import Connection

from rich.console import Console
from rich.table import Table

SIDES = {
    "bfloat16": "precision={use: full, compute: bfloat16}",
    "fp8": "precision={use: fp8}",
    "fp8, no compiler": "precision={use: fp8}",
}
WARM_UP = 2


def side(name: str, preset: str, link: Connection) -> None:
    """Take a step whenever asked, and answer with its CPU seconds."""
    if "no compiler" in name:
        os.environ["CXX"] = "no-such-compiler"
    import torch

    from tangram.core import load_preset
    from tangram.core.assembly import Seat, assemble
    from tangram.core.step import train_step

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run = assemble(load_preset(preset, SIDES[name]), Seat())
    sequences = int(run.experiment.train.batch_sequences(run.progress))
    while link.recv():
        batch = run.data.batch(run.progress, sequences)
        start = time.process_time()
        train_step(run, batch)
        link.send(time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="v3-tiny")
    parser.add_argument("--rounds", type=int, default=7)
    wanted = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    links = {}
    for name in SIDES:
        links[name], theirs = context.Pipe()
        context.Process(target=side, args=(name, wanted.preset, theirs), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(WARM_UP + wanted.rounds):
        for name, link in links.items():
            link.send(True)
            taken = link.recv()
            if turn >= WARM_UP:
                seconds[name].append(taken)
    for link in links.values():
        link.send(False)
    table = Table(title=f"A step of {wanted.preset}, one thread, {wanted.rounds} rounds: least, median, most")
    for column in ("precision", "CPU seconds", "ratio to bfloat16"):
        table.add_column(column)
    base = seconds["bfloat16"]
    for name, taken in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(taken, base, strict=True)]
        table.add_row(name, *("{:.2f}  {:.2f}  {:.2f}".format(*_spread(each)) for each in (taken, ratios)))
    Console(width=120).print(table)


def _spread(values: list[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


if __name__ == "__main__":
    main()

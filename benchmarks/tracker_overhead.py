"""What handing every step to a tracker costs, against the same step unwatched, in alternation.

    python benchmarks/tracker_overhead.py [--preset v3-tiny] [--steps 20] [--rounds 5]

One model takes `steps` steps unwatched, then as many watched, and so on; wandb runs offline into a temporary folder.
Printed is what the watched steps take more, in CPU seconds of this process with all its threads and in wall seconds,
as a share of the unwatched ones, round by round.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tangram.core import load_preset
from tangram.core.assembly import assemble, sequences_at
from tangram.core.plugins import run_manager
from tangram.core.process import settle
from tangram.core.session import RunView
from tangram.core.step import train_step

WARM_UP = 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="v3-tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    settle()
    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "offline"
    experiment = load_preset(asked.preset, "data={use: synthetic}", "observers={wandb: {}}")
    run = assemble(experiment)
    observer = experiment.observers["wandb"].build()
    hook = run_manager({"wandb": observer}).hook
    with tempfile.TemporaryDirectory() as folder:
        view = RunView(experiment, Path(folder), run.progress, {}, 0)
        hook.tangram_run_started(run=view)

        def steps(watched: bool) -> tuple[float, float]:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(asked.steps):
                report = train_step(run, run.data.batch(run.progress, sequences_at(experiment, run.progress)))
                if watched:
                    hook.tangram_step_ended(run=view, report=report)
            return time.process_time() - cpu, time.perf_counter() - wall

        for _ in range(WARM_UP):
            steps(watched=True)
        pairs = [(steps(watched=False), steps(watched=True)) for _ in range(asked.rounds)]
        hook.tangram_run_ended(run=view, error=None)
    for name, which in (("CPU", 0), ("wall", 1)):
        print(f"{name}: {spread([after[which] / before[which] - 1 for before, after in pairs])}")


def spread(values: list[float]) -> str:
    """Return the median with the smallest and largest."""
    shown = [format(value, "+.2%") for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


if __name__ == "__main__":
    main()

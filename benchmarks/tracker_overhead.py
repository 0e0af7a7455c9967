"""What handing every step to wandb costs, as a share of the step.

    python benchmarks/tracker_overhead.py [--preset v3-tiny] [--steps 60] [--rounds 5]

One thread takes the steps, and every step is handed over as a run does it; wandb runs offline into a temporary folder.
The clocks are read around each step and around each hand-over, so that what a step costs more or less for other
reasons does not matter. Printed, as the median of the rounds with the smallest and the largest: how long training
waits in the hook (wall time), and the CPU time of everything that tracking is: the hook, the thread that hands rows to
wandb's process, and that process. The first is what a step takes longer where a core is free for the rest; the sum of
all is what it could take longer where none is. The start and the end of wandb are printed apart, in seconds.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from attrs import frozen

from tangram.core import load_preset
from tangram.core.assembly import Seat, assemble, sequences_at
from tangram.core.plugins import run_manager
from tangram.core.process import settle
from tangram.core.records import StepReport
from tangram.core.session import RunView
from tangram.core.step import Trainer, train_step

WARM_UP = 3


@frozen
class Round:
    """What the steps of a round took, and what handing them over did.

    Attributes:
        wall: Wall seconds of the steps.
        cpu: CPU seconds of the steps.
        waited: Wall seconds in the hook.
        hook: CPU seconds in the hook.
        sender: CPU seconds of the thread that hands rows on.
        process: CPU seconds of wandb's own processes.
    """

    wall: float
    cpu: float
    waited: float
    hook: float
    sender: float
    process: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="v3-tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    settle()
    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "offline"
    experiment = load_preset(asked.preset, "data={use: synthetic}", "observers={wandb: {}}")
    run = assemble(experiment, Seat())
    hook = run_manager({"wandb": experiment.observers["wandb"].build()}).hook
    with tempfile.TemporaryDirectory() as folder:
        view = RunView(experiment, Path(folder), run.progress, {}, 0)
        began = time.perf_counter()
        hook.tangram_run_started(run=view)
        start = time.perf_counter() - began

        def handed_over(steps: int) -> Round:
            return take(run, steps, lambda report: hook.tangram_step_ended(run=view, report=report))

        handed_over(WARM_UP)
        rounds = [handed_over(asked.steps) for _ in range(asked.rounds)]
        began = time.perf_counter()
        hook.tangram_run_ended(run=view, error=None)
        end = time.perf_counter() - began
    step = statistics.median(r.wall for r in rounds) / asked.steps
    print(f"{asked.rounds} rounds of {asked.steps} steps of {asked.preset}, of {step:.3f} s each")
    print(f"training waits in the hook:  {spread([r.waited / r.wall for r in rounds])} of the step's wall time")
    print(f"CPU of the hook:             {spread([r.hook / r.cpu for r in rounds])} of the step's CPU time")
    print(f"CPU of the sending thread:   {spread([r.sender / r.cpu for r in rounds])}")
    print(f"CPU of wandb's processes:    {spread([r.process / r.cpu for r in rounds])}")
    print(f"CPU of all of it:            {spread([(r.hook + r.sender + r.process) / r.cpu for r in rounds])}")
    print(f"once a run: {start:.1f} s to start, {end:.1f} s to end")


def take(run: Trainer, steps: int, hand_over: Callable[[StepReport], object]) -> Round:
    """Take steps and hand each over; return what that took."""
    sender = next(thread for thread in threading.enumerate() if thread.name == "wandb")
    assert sender.ident is not None
    clock = time.pthread_getcpuclockid(sender.ident)
    sent, processes = time.clock_gettime(clock), cpu_below()
    wall = cpu = waited = hook = 0.0
    for _ in range(steps):
        before = time.perf_counter(), time.thread_time()
        report = train_step(run, run.data.batch(run.progress, sequences_at(run.experiment, run.progress)))
        between = time.perf_counter(), time.thread_time()
        hand_over(report)
        after = time.perf_counter(), time.thread_time()
        wall, cpu = wall + between[0] - before[0], cpu + between[1] - before[1]
        waited, hook = waited + after[0] - between[0], hook + after[1] - between[1]
    return Round(wall, cpu, waited, hook, time.clock_gettime(clock) - sent, cpu_below() - processes)


def cpu_below() -> float:
    """Return the CPU seconds of all processes below this one so far."""
    return sum(ticks for ticks in below(os.getpid())) / os.sysconf("SC_CLK_TCK")


def below(pid: int) -> Iterator[int]:
    """Yield the clock ticks of each process below `pid`."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            yield int(fields[11]) + int(fields[12])
            yield from below(child)


def spread(values: list[float]) -> str:
    """Return the median with the smallest and largest."""
    shown = [format(value, ".2%") for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


if __name__ == "__main__":
    main()

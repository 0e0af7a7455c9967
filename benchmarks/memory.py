"""What a micro-batch keeps in memory under each `model.recompute`, and what that costs; EMA; the optimizer's state.

    python benchmarks/memory.py [--presets v3-tiny v3-tiny-fp8] [--rounds 5] [--steps 8]

For each preset and setting:

* predicted: what `tangram describe` says that a forward of one micro-batch keeps for backward;
* counted: the bytes of the storages that such a forward leaves alive, every row one document;
* isolated: the same for the one of 32 micro-batches with the most documents, with `data.isolate=true`;
* grown: by how much the anonymous memory of a child process is larger after that first forward than before it;
* CPU seconds of a training step, over those of a step under `none`. The settings take steps in turn.

Then, for the first preset, the time of a step with and without the moving average of its observer `ema`, in rounds by
turns; a round with it ends when the last average is taken. Then the bytes of the state of AdamW after a step, with
moments in float32 and in bfloat16. One thread; medians with the smallest and largest.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from attrs import evolve

from tangram.core import build_model, load_preset
from tangram.core.activations import kept_bytes, predict
from tangram.core.assembly import Seat, assemble, sequences_at
from tangram.core.experiment import RECOMPUTE, Experiment
from tangram.core.model import Model
from tangram.core.plugins import run_manager
from tangram.core.process import settle
from tangram.core.records import Batch, Progress, one_document
from tangram.core.session import RunView
from tangram.core.step import Trainer, train_step

WARM_UP = 2


def under(experiment: Experiment, recompute: str) -> Experiment:
    """Return the experiment under another setting."""
    return evolve(experiment, model=evolve(experiment.model, recompute=recompute))


def of_one_document_each(experiment: Experiment) -> Batch:
    """Return a micro-batch of drawn tokens, every row one document."""
    train = experiment.train
    tokens = torch.randint(experiment.model.vocab_size, (train.micro_sequences, train.sequence_length))
    positions = torch.arange(train.sequence_length).expand_as(tokens)
    return Batch(tokens, tokens, positions, one_document(tokens), tokens.numel(), len(tokens))


def print_activations(name: str, rounds: int) -> None:
    """Print what each setting keeps, and what it costs."""
    experiment = load_preset(name)
    predicted, costs = predict(experiment), step_costs(experiment, rounds)
    train, crowded = experiment.train, most_documents(load_preset(name, "data.isolate=true"))
    print(f"\n{name}: a micro-batch of {train.micro_sequences} x {train.sequence_length} tokens, MiB kept for backward")
    print(f"{'recompute':12}{'predicted':>12}{'counted':>12}{'isolated':>12}{'grown':>12}   CPU seconds of a step")
    for recompute in RECOMPUTE:
        asked = under(experiment, recompute)
        model = build_model(asked)
        counted, isolated = (kept_bytes(model, batch) for batch in (of_one_document_each(asked), crowded))
        child = subprocess.run(
            [sys.executable, __file__, "--presets", name, "--grow", recompute],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        figures = (predicted[recompute], counted, isolated, int(child.stdout))
        shown = "".join(f"{figure / 2**20:12.1f}" for figure in figures)
        print(f"{recompute:12}{shown}   {spread(costs[recompute], '.2f')} of those under none")


def most_documents(experiment: Experiment) -> Batch:
    """Return the micro-batch of the preset's data, of 32, whose rows have the most documents."""
    train = experiment.train
    data = experiment.data.build(train, experiment.model.vocab_size)
    batch, micro = data.batch(Progress(), 32 * train.micro_sequences), train.micro_sequences
    parts = [batch.rows(start, start + micro) for start in range(0, 32 * micro, micro)]
    return max(parts, key=lambda part: int(part.segments.diff(dim=1).count_nonzero()))


def step_costs(experiment: Experiment, rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of a step under each setting over those under `none` in the same round."""
    runs = {recompute: assemble(under(experiment, recompute), Seat()) for recompute in RECOMPUTE}
    costs: dict[str, list[float]] = {recompute: [] for recompute in RECOMPUTE}
    for i in range(WARM_UP + rounds):
        seconds = {recompute: take(run, 1)[1] for recompute, run in runs.items()}
        if i >= WARM_UP:
            for recompute in RECOMPUTE:
                costs[recompute].append(seconds[recompute] / seconds["none"])
    return costs


def take(run: Trainer, steps: int) -> tuple[float, float]:
    """Take steps; return their wall and CPU seconds."""
    began = time.perf_counter(), time.process_time()
    for _ in range(steps):
        train_step(run, run.data.batch(run.progress, sequences_at(run.experiment, run.progress)))
    return time.perf_counter() - began[0], time.process_time() - began[1]


def print_growth(name: str, recompute: str) -> None:
    """Print by how many bytes this process grows in a forward, whose blocks the environment has mapped one by one."""
    torch.set_num_threads(1)
    experiment = under(load_preset(name), recompute)
    model, batch = build_model(experiment), of_one_document_each(experiment)
    for loss in forward(model, batch):  # a first pass loads what is loaded once
        loss.backward(retain_graph=True)
    model.zero_grad(set_to_none=True)
    before = resident()
    losses = forward(model, batch)
    print(resident() - before)
    assert losses


def forward(model: Model, batch: Batch) -> Sequence[torch.Tensor]:
    """Return the losses, on which the graph hangs."""
    return [loss.value for _, loss in model(batch, Progress()).losses]


def resident() -> int:
    """Return the anonymous resident memory of this process, bytes, once what is free is given back."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def print_average(name: str, rounds: int, steps: int) -> None:
    """Print what the moving average costs of a step."""
    experiment = load_preset(name)
    run, ema = assemble(experiment, Seat()), experiment.observers["ema"].build()
    hook = run_manager({"ema": ema}).hook
    with tempfile.TemporaryDirectory() as folder:
        view = RunView(experiment, Path(folder), run.progress, {}, 0)
        hook.tangram_model_built(run=view, model=run.model)
        walls: dict[bool, list[float]] = {True: [], False: []}
        cpus: dict[bool, list[float]] = {True: [], False: []}
        waits: list[float] = []
        take(run, WARM_UP)
        for _ in range(rounds):
            for watched in (False, True):
                began, waited = (time.perf_counter(), time.process_time()), 0.0
                for _ in range(steps):
                    batch = run.data.batch(run.progress, sequences_at(experiment, run.progress))
                    report = train_step(run, batch)
                    if watched:
                        before = time.perf_counter()
                        hook.tangram_step_ended(run=view, report=report)
                        waited += time.perf_counter() - before
                ema.averaged()
                walls[watched].append((time.perf_counter() - began[0]) / steps)
                cpus[watched].append((time.process_time() - began[1]) / steps)
                if watched:
                    waits.append(waited / steps / walls[True][-1])
        hook.tangram_run_ended(run=view, error=None)
    print(f"\n{name}: the moving average, {rounds} rounds of {steps} steps with and without, by turns")
    for what, times in (("wall seconds of a step", walls), ("CPU seconds of a step", cpus)):
        ratios = [one / other for one, other in zip(times[True], times[False], strict=True)]
        print(f"{what}: with {spread(times[True], '.3f')}, without {spread(times[False], '.3f')}")
        print(f"    with over without: {spread(ratios, '.3f')}")
    print(f"training waits in the hook: {spread(waits, '.2%')} of a step's wall time")


def print_moments(name: str) -> None:
    """Print the size of the optimizer's state by the dtype of its moments."""
    for moments in ("float32", "bfloat16"):
        run = assemble(load_preset(name, f"optimizer={{use: adamw, moments: {moments}}}"), Seat())
        take(run, 1)
        tensors = [t for state in run.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        weights = sum(parameter.nbytes for parameter in run.model.parameters())
        held = sum(tensor.nbytes for tensor in tensors)
        print(f"{name}, AdamW with {moments} moments: {held:,} bytes of state for {weights:,} of weights")


def spread(values: Sequence[float], form: str) -> str:
    """Return the median with the smallest and largest."""
    shown = [format(value, form) for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["v3-tiny", "v3-tiny-fp8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of a round with or without the moving average")
    parser.add_argument("--grow", choices=RECOMPUTE, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.grow:
        print_growth(asked.presets[0], asked.grow)
        return
    settle()
    torch.set_num_threads(1)
    for name in asked.presets:
        print_activations(name, asked.rounds)
    print_average(asked.presets[0], asked.rounds, asked.steps)
    print()
    print_moments(asked.presets[0])


if __name__ == "__main__":
    main()

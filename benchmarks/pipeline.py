"""What a stage costs, what each schedule makes of it on 2 to 64 ranks, and how long steps take on 2 and 4 processes.

    python benchmarks/pipeline.py [--out DIR] [--rounds 9] [--microbatches 128]

* Costs: F, I, W and the overlapped pair of a stage of two blocks of v3-tiny for a micro-batch of 1 x 256 tokens, in CPU
  seconds at one thread. The executor runs the stage between two that do nothing; F is the time of its phases, W that of
  the closures of its weights' gradients, I and the pair the rest. Every core measures at once, as in a step.
* Bubble: every schedule is simulated with these costs for the same number of micro-batches. A schedule with two stages
  of a flow on each rank has stages half as long.
* Steps: a model of eight such blocks, with a vocabulary of 512 and without multi-token prediction, so that stages are
  alike, takes steps in processes that talk through gloo; the schedules take turns. Timed are forward and backward, from
  the first rank's beginning to the last one's end, without the sum of gradients that follows. Where there are more
  processes than cores, no step can be shorter than the work of all ranks over the cores. How long a rank waited for
  a core is what Linux says: it is small only where nothing else runs, or what runs gives way
  (`echo -20 > /proc/self/autogroup` and `nice -n -20`, as root).

Medians, smallest and largest in brackets. `--out` writes pipeline.md and pipeline.svg.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import evolve, frozen
from torch import Tensor, distributed

from tangram.core import build_model, load_preset
from tangram.core.assembly import Seat, assemble
from tangram.core.autograd import WeightGrads
from tangram.core.context import Parallel
from tangram.core.contracts import Pipeline
from tangram.core.drawing import COLOURS, DASHES, drawing
from tangram.core.executor import Executor
from tangram.core.experiment import Experiment
from tangram.core.layout import Layout
from tangram.core.model import Model
from tangram.core.plan import Action, Op, Plan, Slot, overlap
from tangram.core.process import settle
from tangram.core.records import Batch, Carry, Loss, Phase, Progress
from tangram.core.simulator import Costs, simulate
from tangram.testing import run_ranks

SCHEDULES = ("gpipe", "one_f_one_b", "interleaved", "zero_bubble", "dualpipe", "dualpipev")
BLOCKS, LAYERS = 2, 8
MICROBATCHES = 8
RANKS, PROCESSES = (2, 4, 8, 16, 32, 64), (2, 4)
WARM_UP = 2
SHAPE = (
    f"model.blocks=[{{repeat: {LAYERS}}}]",
    "model.vocab_size=512",
    "objectives.mtp=null",
    "data={use: synthetic}",
    f"train={{sequence_length: 256, micro_sequences: 1, batch_sequences: {MICROBATCHES}}}",
)


def shaped(*overrides: str) -> Experiment:
    return load_preset("v3-tiny", *SHAPE, *overrides)


class Clock:
    """CPU seconds of this process, collected under names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, fn: Callable[..., object]) -> Callable[..., object]:
        """Return the function, whose time is added under a name."""

        def run(*args: object) -> object:
            began = time.process_time()
            given = fn(*args)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began
            return given

        return run


class TimedWeightGrads(WeightGrads):
    """The queue of weight gradients, whose closures are timed."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def give(self, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
        return super().give(weight, self._clock.timed("weight", compute))


class Between:
    """A `Program` of three stages, the outer two of which do nothing."""

    n_stages = 3

    def __init__(self, model: Model, clock: Clock, tokens: Tensor) -> None:
        self._model, self._clock = model, clock
        self._hidden, self._grad = (torch.randn(1, tokens.shape[1], model.dim) for _ in range(2))
        self.dim, self.compute, self.load_shape = model.dim, model.compute, model.load_shape

    def phases(self, stage: int, batch: Batch, now: Progress) -> Sequence[Phase]:
        if stage == 0:
            return [Phase("begin", "compute", lambda _: Carry(hidden=self._hidden.clone().requires_grad_()))]
        if stage == 2:
            return [Phase("end", "compute", self._end)]
        phases = self._model.phases(1, batch, now)
        return [phase._replace(fn=self._clock.timed("forward", phase.fn)) for phase in phases]

    def _end(self, carry: Carry) -> Carry:
        return evolve(carry, losses=(("end", Loss((carry.hidden * self._grad).sum())),))

    def weights(self, now: Progress) -> Mapping[str, float]:
        return {"end": 1.0, **self._model.weights(now)}


def orders(count: int) -> dict[str, list[Action]]:
    """Return what one rank does with all three stages, the middle one's backward whole, in halves, or in pairs."""

    def forward(number: int) -> list[Action]:
        return [Action(Op.FORWARD, Slot(0, stage, number)) for stage in range(3)]

    def backward(number: int, *ops: Op) -> list[Action]:
        return [Action(op, Slot(0, stage, number)) for stage in (2, 1, 0) for op in ops]

    whole, halves, pairs = [], [], forward(0)
    for number in range(count):
        whole += [*forward(number), *backward(number, Op.BACKWARD)]
        halves += [*forward(number), *backward(number, Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD)]
    for number in range(1, count):
        (first, inner, last), (end, back, begin) = forward(number), backward(number - 1, Op.BACKWARD)
        pairs += [first, end, overlap(inner.slot, back.slot), last, begin]
    return {"whole": whole, "halves": halves, "pairs": pairs + backward(count - 1, Op.BACKWARD)}


def stage_costs(rank: int, rounds: int, count: int = MICROBATCHES) -> list[dict[str, float]]:
    """Return the CPU seconds of each kind of work on a stage, round by round."""
    prepare()
    clock, place = Clock(), {(0, stage): 0 for stage in range(3)}
    parallel = Parallel(layout=Layout(place), weight_grads=TimedWeightGrads(clock))
    experiment = shaped(f"model.blocks=[{{repeat: {3 * BLOCKS}}}]")
    model = build_model(experiment, parallel=parallel)
    batch = experiment.data.build(experiment.train, experiment.model.vocab_size).batch(Progress(), count)
    program, found = Between(model, clock, batch.tokens), []
    plans = {name: Plan(3, (count,), place, (tuple(order),)) for name, order in orders(count).items()}
    executors = {name: Executor(program, lambda _, p=p: p, 1, parallel, lambda: None) for name, p in plans.items()}
    for turn in range(WARM_UP + rounds):
        taken = {}
        for name, executor in executors.items():
            clock.seconds.clear()
            clock.timed("all", executor.run)(batch, Progress())
            taken[name] = {part: seconds / count for part, seconds in clock.seconds.items()}
            model.zero_grad(set_to_none=True)
        if turn >= WARM_UP:
            found.append(_told_apart(taken, count))
    return found


def _told_apart(taken: Mapping[str, Mapping[str, float]], count: int) -> dict[str, float]:
    """Return the cost of each kind of work, given the seconds of the three orders over the number of micro-batches."""
    halves, whole = taken["halves"], taken["whole"]
    alone = whole["all"] / count  # the first forward and the last backward, which have no partner
    return {
        "F": halves["forward"],
        "I": halves["all"] - halves["forward"] - halves["weight"],
        "W": halves["weight"],
        "B": whole["all"] - whole["forward"],
        "F&B": (taken["pairs"]["all"] - alone) * count / (count - 1),
    }


def prepare() -> None:
    """Set this process up as one that trains."""
    settle()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@frozen
class Took:
    """A step of one rank, in seconds.

    Attributes:
        began: When it did, by a clock that all ranks share.
        ended: When its last backward did.
        cpu: CPU seconds between.
        waited: Between, ready to run and without a core.
        summing: From there until gradients were summed over their holders.
    """

    began: float
    ended: float
    cpu: float
    waited: float
    summing: float


def moment() -> tuple[float, float, float]:
    """Return the time, this process's CPU seconds, and for how long it was ready to run and had no core."""
    waited = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return time.perf_counter(), time.process_time(), waited


def steps(rank: int, ranks: int, rounds: int) -> dict[str, list[Took]]:
    """Take steps with each schedule by turns; return what they took."""
    prepare()
    takers = {name: _taker(name, Seat(rank, ranks)) for name in SCHEDULES}
    found: dict[str, list[Took]] = {name: [] for name in takers}
    for turn in range(WARM_UP + rounds):
        for name, take in takers.items():
            took = take()
            if turn >= WARM_UP:
                found[name].append(took)
    return found


def _taker(name: str, seat: Seat) -> Callable[[], Took]:
    run = assemble(shaped(f"parallel={{pipeline: {{use: {name}}}, pipeline_ranks: {seat.ranks}}}"), seat)
    pipeline, marks = pipeline_of(name), []

    def reduce() -> None:
        marks.append(moment())
        run.sharding.reduce()

    executor = Executor(run.model, partial(pipeline.schedule, seat.ranks), 1, run.parallel, reduce)
    batch = run.data.batch(run.progress, MICROBATCHES)

    def take() -> Took:
        distributed.barrier()
        began, cpu, waited = moment()
        executor.run(batch, run.progress)
        end, (ended, cpu_then, waited_then) = time.perf_counter(), marks.pop()
        run.model.zero_grad(set_to_none=True)
        return Took(began, ended, cpu_then - cpu, waited_then - waited, end - ended)

    return take


def costs_of(plan: Plan, stages: int, costs: Costs) -> Costs:
    """Return the costs of the plan's stages, given those of one of `stages` that share out the same layers."""
    kinds = ("forward", "input", "weight", "overlap")
    return evolve(costs, **{kind: getattr(costs, kind) * stages / plan.stages for kind in kinds})


def idle(pipeline: Pipeline, ranks: int, microbatches: int, costs: Costs) -> float:
    """Return which share of the ranks' time nothing is done."""
    plan = pipeline.schedule(ranks, microbatches)
    timeline = simulate(plan, costs_of(plan, ranks, costs))
    return statistics.fmean(timeline.bubble) / timeline.makespan


def bubbles(microbatches: int, costs: Costs) -> dict[str, list[float]]:
    """Return the idle share of each schedule on each number of ranks."""
    built = {name: pipeline_of(name) for name in SCHEDULES}
    return {name: [idle(one, ranks, microbatches, costs) for ranks in RANKS] for name, one in built.items()}


def pipeline_of(name: str) -> Pipeline:
    return shaped(f"parallel.pipeline={{use: {name}}}").parallel.pipeline.build()


def drawn(found: Mapping[str, Sequence[float]], microbatches: int) -> str:
    """Return the picture of bubble against ranks as SVG."""
    with drawing("pipeline", width=6.4, height=4.2) as (axes, made):
        for number, (name, shares) in enumerate(found.items()):
            dash, colour = DASHES[number % len(DASHES)], COLOURS[number]
            axes.plot(RANKS, [100 * share for share in shares], dash, color=colour, marker="o", ms=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"pipeline ranks, {microbatches} micro-batches")
        axes.set_ylabel("bubble, % of the ranks' time")
        axes.legend(frameon=False)
    return made[0]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def costs_table(found: Sequence[Mapping[str, float]]) -> str:
    rows = [(f"{kind}, CPU ms", spread([1e3 * row[kind] for row in found], ".1f")) for kind in found[0]]
    whole = [row["B"] / (row["I"] + row["W"]) for row in found]
    pair = [row["F&B"] / (row["F"] + row["I"] + row["W"]) for row in found]
    rows += [("B over I + W", spread(whole, ".2f")), ("F&B over F + I + W", spread(pair, ".2f"))]
    return table(("work", "measured"), rows)


def steps_table(ranks: int, took: Sequence[Mapping[str, Sequence[Took]]], costs: Costs) -> str:
    """Return measured beside simulated steps.

    Args:
        ranks: Processes.
        took: What each rank's steps took, by schedule.
        costs: Of a stage of `BLOCKS` blocks.
    """
    cores = min(ranks, os.cpu_count() or 1)
    header = (
        "schedule",
        "simulated, s",
        f"at least on {cores} cores, s",
        "measured, s",
        "over that",
        "cores idle: simulated",
        "measured",
        "waited for a core, s",
        "summing gradients, s",
    )
    rows = []
    for name in SCHEDULES:
        plan = pipeline_of(name).schedule(ranks, MICROBATCHES)
        timeline = simulate(plan, costs_of(plan, LAYERS // BLOCKS, costs))
        busy = sum(timeline.makespan - bubble for bubble in timeline.bubble)
        least = max(timeline.makespan, busy / cores)
        together = list(zip(*(rank[name] for rank in took), strict=True))
        walls = [max(one.ended for one in step) - min(one.began for one in step) for step in together]
        shares = [sum(one.cpu for one in step) / cores / wall for step, wall in zip(together, walls, strict=True)]
        rows.append(
            (
                name,
                f"{timeline.makespan:.2f}",
                f"{least:.2f}",
                spread(walls, ".2f"),
                spread([wall / least for wall in walls], ".2f"),
                f"{1 - busy / cores / least:.0%}",
                spread([1 - share for share in shares], ".0%"),
                f"{statistics.median(max(one.waited for one in step) for step in together):.2f}",
                f"{statistics.median(max(one.summing for one in step) for step in together):.2f}",
            )
        )
    return table(header, rows)


def spread(values: Sequence[float], form: str) -> str:
    """Return the median with the smallest and largest."""
    shown = [format(value, form) for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def sections(rounds: int, microbatches: int) -> Iterator[str]:
    """Measure; yield each table under its title, and at last the picture."""
    cores = os.cpu_count() or 1
    found = [row for rank in run_ranks(stage_costs, cores, rounds) for row in rank]
    yield f"## A stage of {BLOCKS} blocks, {cores} processes at once\n\n{costs_table(found)}"
    middle = {kind: statistics.median(row[kind] for row in found) for kind in found[0]}
    costs = Costs(forward=middle["F"], input=middle["I"], weight=middle["W"], overlap=middle["F&B"])
    shares = bubbles(microbatches, costs)
    rows = [(name, *(f"{share:.1%}" for share in found)) for name, found in shares.items()]
    idle = table(("ranks", *map(str, RANKS)), rows)
    yield f"## Bubble over the ranks' time, simulated, {microbatches} micro-batches\n\n{idle}"
    for ranks in PROCESSES:
        took = run_ranks(steps, ranks, ranks, rounds, timeout=1200.0)
        title = f"Steps of {LAYERS} blocks and {MICROBATCHES} micro-batches on {ranks} processes"
        yield f"## {title}\n\n{steps_table(ranks, took, costs)}"
    yield drawn(shares, microbatches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for pipeline.md and pipeline.svg")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--microbatches", type=int, default=128, help="of the simulated steps; a multiple of 128")
    wanted = parser.parse_args()
    if wanted.microbatches < 1 or wanted.microbatches % 128:
        parser.error("--microbatches is a multiple of 128, or 64 ranks refuse them")
    command = shlex.join(["python", "benchmarks/pipeline.py", *sys.argv[1:]])
    machine = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    parts = [f"`{command}`: {machine}; a load of {os.getloadavg()[0]:.1f} before."]
    print(parts[0])
    for part in sections(wanted.rounds, wanted.microbatches):
        parts.append(part)
        if part.startswith("##"):
            print(f"\n{part}", flush=True)
    if wanted.out is not None:
        wanted.out.mkdir(parents=True, exist_ok=True)
        (wanted.out / "pipeline.svg").write_text(parts.pop() + "\n", encoding="utf-8")
        parts.append("![bubble against ranks](pipeline.svg)")
        (wanted.out / "pipeline.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

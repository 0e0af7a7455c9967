"""The first run against `transformers`, for the same CPU seconds.

    pip install transformers==5.23.0
    python benchmarks/first_run.py [--seconds 240] [--set KEY=VALUE]

Both sides begin with the same weights, see the same sequences in the same order, and step the same optimizer with the
same clipping. The learning rate follows v3-tiny's curve, stretched over the CPU seconds that each side has used: one
thread, the training loop alone, without reading data and without evaluation. The side that has used less takes the
next step, so that both meet the same noise of the machine. Ours is v3-tiny with everything on: multi-token prediction,
the sequence-wise balance loss, bias updates, documents kept apart. The peer is `transformers` as shipped, with
the next token as its only loss.

Ours steps AdamW here too, as the peer does.

Printed are the bits per byte that each reaches on all held-out text.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Protocol

import peer
import torch
from attrs import evolve
from torch.nn import functional as F

from tangram.core import load_preset
from tangram.core.assembly import assemble
from tangram.core.contracts import HeldOut
from tangram.core.evaluation import evaluate
from tangram.core.experiment import Experiment
from tangram.core.process import settle
from tangram.core.records import IGNORE, Batch, Progress
from tangram.core.step import Trainer, set_lr, train_step

SIDES = ("tangram", "transformers")


class Side(Protocol):
    """One of the two."""

    def step(self, batch: Batch, now: Progress) -> None:
        """Take the optimizer step at `now`."""

    def bits_per_byte(self, held_out: HeldOut) -> float:
        """Return the bits per byte on all held-out text."""


class Ours:
    """v3-tiny with everything on."""

    def __init__(self, run: Trainer) -> None:
        self.run = run

    def step(self, batch: Batch, now: Progress) -> None:
        self.run.progress = now
        train_step(self.run, batch)

    def bits_per_byte(self, held_out: HeldOut) -> float:
        report = evaluate(self.run)
        assert report is not None and report.bits_per_byte is not None
        return report.bits_per_byte


class Theirs:
    """`transformers` with the same weights, optimizer, curve and clipping."""

    def __init__(self, run: Trainer) -> None:
        self.train, self.micro = run.experiment.train, run.experiment.train.micro_sequences
        self.model = peer.twin(run.model, run.experiment)
        self.optimizer = run.experiment.optimizer.build(list(self.model.named_parameters()))

    def nats(self, batch: Batch) -> torch.Tensor:
        logits = self.model(input_ids=batch.tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")

    def step(self, batch: Batch, now: Progress) -> None:
        set_lr(self.optimizer, self.train.lr(now))
        (self.nats(batch) / batch.n_targets).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bits_per_byte(self, held_out: HeldOut) -> float:
        with torch.no_grad():
            nats = sum(self.nats(batch).item() for batch, _ in held_out.batches(self.micro))
        return nats / math.log(2) / held_out.n_bytes


def experiment(overrides: Iterable[str]) -> Experiment:
    """Return v3-tiny with an optimizer that both sides have, and without observers: they are outside the timed loop."""
    fair = ("optimizer={use: adamw}", "observers={console: null, jsonl: null, ema: null}")
    return load_preset("v3-tiny", *fair, *overrides)


def work(side: str, seconds: float, overrides: list[str]) -> None:
    """Take a step for every line that comes in; answer with the CPU seconds used, and at the end with the result."""
    settle()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    run = assemble(experiment(overrides))
    train, data = run.experiment.train, run.data
    assert data.held_out is not None
    trained: Side = Ours(run) if side == "tangram" else Theirs(run)
    now, used = Progress(), 0.0
    for _ in sys.stdin:
        if used >= seconds:
            break
        batch = data.batch(now, round(train.batch_sequences(now)))
        # Curves are over tokens: here the share of the seconds stands for the share of the tokens.
        curves = evolve(now, tokens=round(train.tokens * used / seconds))
        began = time.process_time()
        trained.step(batch, curves)
        used += time.process_time() - began
        now = now.after(batch)
        print(json.dumps({"used": used}), flush=True)
    bits = trained.bits_per_byte(data.held_out)
    end = {"used": used, "bits": bits, "tokens": now.tokens, "references": dict(data.held_out.references)}
    print(json.dumps(end), flush=True)


def main() -> None:
    """Run both side by side and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of both sides")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        work(asked.side, asked.seconds, asked.set)
        return
    options = ["--seconds", str(asked.seconds), *(part for value in asked.set for part in ("--set", value))]
    workers = {
        side: subprocess.Popen(
            [sys.executable, __file__, *options, "--side", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in SIDES
    }
    used, ends = dict.fromkeys(SIDES, 0.0), {}
    try:
        while used:
            side = min(used, key=lambda name: used[name])
            process = workers[side]
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if "bits" in answer:
                ends[side] = answer
                del used[side]
            else:
                used[side] = answer["used"]
    finally:
        for process in workers.values():
            process.kill()
    print(f"{asked.seconds:.0f} CPU seconds a side, one thread, torch {torch.__version__}, {' '.join(asked.set)}")
    for side, end in ends.items():
        print(f"{side:14} {end['bits']:.3f} bits per byte after {end['tokens']:,} tokens")
    for name, bits in ends["tangram"]["references"].items():
        print(f"{name:14} {bits:.3f}")
    print(f"difference     {ends['transformers']['bits'] - ends['tangram']['bits']:.3f}")


if __name__ == "__main__":
    main()

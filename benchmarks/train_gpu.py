"""Training steps on one GPU, in bfloat16 and in FP8, against `transformers` in bfloat16, side by side in one run.

    pip install transformers==5.23.0
    python benchmarks/train_gpu.py [--batch 4] [--length 4096] [--rounds 10]
    python benchmarks/train_gpu.py --tiny

The model has the components of deepseek-v3 and 1.1 billion parameters: width 1536, 12 layers of which the first is
dense, 16 heads with V3's head widths and its latent of 512, 32 experts of 512 of which a token takes 4, and a shared
one, a vocabulary of 32,768. It is built with the same weights three times; loss and gradients are compared first,
in float32. Then the sides take a step in turn: forward, backward, AdamW, on fresh random tokens. Ours keep float32
masters and bfloat16 moments, as DeepSeek-V3 does; the peer's weights and moments are bfloat16. Printed are tokens a
second, and the ratio to `transformers`, round by round.

With --tiny the same code runs at a toy size, on a CPU too; its figures say nothing.
"""

import argparse
import time
from collections.abc import Callable

import peer
import torch
from rich.console import Console
from rich.table import Table

from tangram.core.assembly import Seat, assemble
from tangram.core.experiment import Experiment
from tangram.core.step import Trainer, train_step

PEER = "transformers, bfloat16"
SIDES = {"tangram, bfloat16": "bfloat16", "tangram, fp8": "fp8", PEER: "bfloat16"}
WARM_UP = 3
APART = 0.02
"""Most by which the losses of the first step may differ, relative to the peer's: FP8 rounds to 3 bits."""

Step = Callable[[torch.Tensor], float]


def stepper(side: str, size: str, batch: int, device: str) -> Step:
    """Return a function that takes a step on tokens [B, S] and returns its loss."""
    experiment = peer.experiment(size, SIDES[side], batch, "optimizer.moments=bfloat16")
    run = assemble(experiment, Seat(device=torch.device(device)))
    return theirs(run, experiment, device) if side == PEER else ours(run)


def ours(run: Trainer) -> Step:
    """Return tangram's step."""
    return lambda ids: train_step(run, peer.batch_of(ids)).result.losses["next_token"]


def theirs(run: Trainer, experiment: Experiment, device: str) -> Step:
    """Return the step of `transformers`."""
    model = peer.in_bfloat16(peer.twin(run.model, experiment)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def timed(step: Step, ids: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of a step and its loss."""
    began = time.perf_counter()
    loss = step(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, loss


def rounds(steps: dict[str, Step], draw: Callable[[int], torch.Tensor], count: int) -> dict[str, list[float]]:
    """Return the seconds of every side's steps, which take turns.

    Raises:
        SystemExit: The losses of the first step are too far apart.
    """
    taken: dict[str, list[float]] = {side: [] for side in steps}
    for seed in range(WARM_UP + count):
        ids = draw(seed)
        losses = {}
        for side, step in steps.items():
            seconds, losses[side] = timed(step, ids)
            if seed >= WARM_UP:
                taken[side].append(seconds)
        if seed == 0:
            print("first losses: " + ", ".join(f"{side} {loss:.4f}" for side, loss in losses.items()))
            if any(not abs(loss / losses[PEER] - 1) <= APART for loss in losses.values()):
                raise SystemExit("the sides do not compute the same: no figure is worth printing")
    return taken


def main() -> None:
    """Compare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a toy size, on a CPU if there is no GPU")
    asked = parser.parse_args()
    if not (torch.cuda.is_available() or asked.tiny):
        parser.exit(2, "train_gpu.py needs a GPU, and there is none; --tiny runs the same code at a toy size\n")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, batch, length = ("toy", 2, 64) if asked.tiny else ("1.1B", asked.batch, asked.length)
    peer.compare(size, device, min(length, peer.LENGTH))
    steps = {side: stepper(side, size, batch, device) for side in SIDES}
    vocabulary = peer.experiment(size, "bfloat16", batch).model.vocab_size
    taken = rounds(steps, lambda seed: peer.tokens(vocabulary, batch, seed, length).to(device), asked.rounds)
    machine = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    title = f"{size}, {batch} x {length} tokens a step, {asked.rounds} rounds on {machine}, torch {torch.__version__}"
    table = Table(title=f"{title}: median (least to most)")
    for column in ("side", "tokens a second", "times transformers"):
        table.add_column(column)
    for side, seconds in taken.items():
        rate = peer.spread([batch * length / each for each in seconds], ",.0f")
        ratio = peer.spread([a / b for a, b in zip(taken[PEER], seconds, strict=True)], ".2f")
        table.add_row(side, rate, ratio)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

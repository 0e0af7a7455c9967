"""Training steps on a CPU against `transformers`, side by side in one run.

    pip install transformers==5.23.0
    python benchmarks/train_cpu.py [--size 19.5M] [--compute float32] [--batch 8] [--rounds 5]

The same model with the same weights is built in both; loss and gradients are compared first. Then one worker process
a side takes a step in turn: forward, backward, AdamW, on fresh random tokens, rows of 512. Printed are tokens per
CPU-second at one thread, and the ratio to `transformers` as shipped, round by round. The second peer is `transformers`
with its values padded to the width of its keys, which spares it the slow path of its attention.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import peer
import torch
from torch.nn import functional as F

from tangram.core.assembly import Seat, assemble
from tangram.core.process import settle
from tangram.core.step import train_step

SIDES = ("tangram", "transformers", "transformers, values padded")
WARM_UP = 2


def padded(module, query, key, value, mask, scaling, dropout=0.0, **_):  # type: ignore[no-untyped-def]
    """Attention for the peer with its values padded."""
    wide = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    out = F.scaled_dot_product_attention(query, key, wide, is_causal=True, scale=scaling)
    return out[..., : value.shape[-1]].transpose(1, 2).contiguous(), None


def stepper(side: str, size: str, compute: str, batch: int) -> Callable[[int], float]:
    """Return a function that takes the step with a given seed and returns its loss."""
    experiment = peer.experiment(size, compute, batch)
    run = assemble(experiment, Seat())
    if side == "tangram":
        return lambda seed: train_step(
            run, peer.batch_of(peer.tokens(experiment.model.vocab_size, batch, seed))
        ).result.losses["next_token"]
    from transformers import AttentionInterface

    AttentionInterface.register("padded", padded)
    model = peer.twin(run.model, experiment, "padded" if "padded" in side else "sdpa")
    if compute == "bfloat16":
        peer.in_bfloat16(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(seed: int) -> float:
        ids = peer.tokens(experiment.model.vocab_size, batch, seed)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def work(side: str, size: str, compute: str, batch: int) -> None:
    """Take a step for every line that comes in; answer with its CPU seconds."""
    if side == "tangram":
        settle()  # as every training process of ours does
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    step = stepper(side, size, compute, batch)
    for seed, _ in enumerate(sys.stdin):
        began = time.process_time()
        loss = step(seed)
        print(json.dumps({"seconds": time.process_time() - began, "loss": loss}), flush=True)


def rounds(size: str, compute: str, batch: int, count: int) -> Iterator[dict[str, float]]:
    """Yield the CPU seconds of a step of each side, round by round."""
    shape = ["--size", size, "--compute", compute, "--batch", str(batch)]
    workers = {
        side: subprocess.Popen(
            [sys.executable, __file__, *shape, "--side", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for side in SIDES
    }
    try:
        for i in range(WARM_UP + count):
            seconds = {}
            for side, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write("step\n")
                worker.stdin.flush()
                seconds[side] = float(json.loads(worker.stdout.readline())["seconds"])
            if i >= WARM_UP:
                yield seconds
    finally:
        for worker in workers.values():
            worker.kill()


def main() -> None:
    """Compare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("19.5M", "105M"), default="19.5M")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        work(asked.side, asked.size, asked.compute, asked.batch)
        return
    peer.compare(asked.size)
    times = list(rounds(asked.size, asked.compute, asked.batch, asked.rounds))
    tokens = asked.batch * peer.LENGTH
    machine = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{asked.size}, {asked.compute}, {asked.batch} x {peer.LENGTH}, one thread, {machine}")
    for side in SIDES:
        rate = peer.spread([tokens / row[side] for row in times], ",.0f")
        ratio = peer.spread([row["transformers"] / row[side] for row in times], ".2f")
        print(f"{side:28} {rate} tokens per CPU-second; {ratio} times transformers")


if __name__ == "__main__":
    main()

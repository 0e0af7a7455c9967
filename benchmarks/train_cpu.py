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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import peer
import torch
from torch.nn import functional as F

from tangram.core.assembly import assemble
from tangram.core.process import settle
from tangram.core.records import IGNORE, Batch
from tangram.core.step import train_step

SIDES = ("tangram", "transformers", "transformers, values padded")
WARM_UP = 2


def batch_of(ids: torch.Tensor) -> Batch:
    """Return the batch whose loss is the one that the peer takes: the last position has no target."""
    targets = torch.full_like(ids, IGNORE)
    targets[:, :-1] = ids[:, 1:]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, targets, positions, torch.zeros_like(ids), int((targets != IGNORE).sum()), len(ids))


def padded(module, query, key, value, mask, scaling, dropout=0.0, **_):  # type: ignore[no-untyped-def]
    """Attention for the peer with its values padded."""
    wide = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    out = F.scaled_dot_product_attention(query, key, wide, is_causal=True, scale=scaling)
    return out[..., : value.shape[-1]].transpose(1, 2).contiguous(), None


def stepper(side: str, size: str, compute: str, batch: int) -> Callable[[int], float]:
    """Return a function that takes the step with a given seed and returns its loss."""
    experiment = peer.experiment(size, compute, batch)
    run = assemble(experiment)
    if side == "tangram":
        return lambda seed: train_step(
            run, batch_of(peer.tokens(experiment.model.vocab_size, batch, seed))
        ).result.losses["next_token"]
    from transformers import AttentionInterface

    AttentionInterface.register("padded", padded)
    model = peer.twin(run.model, experiment, "padded" if "padded" in side else "sdpa")
    if compute == "bfloat16":
        biases = {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
        model.to(torch.bfloat16)
        for name, bias in biases.items():
            model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(seed: int) -> float:
        ids = peer.tokens(experiment.model.vocab_size, batch, seed)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def compare(size: str) -> None:
    """Check that both sides compute one loss and one gradient, in float32."""
    experiment = peer.experiment(size, "float32", 2)
    run = assemble(experiment)
    for parameter in run.model.parameters():
        parameter.data *= 3 if parameter.ndim > 1 else 1  # or the routing would be nearly flat
    other = peer.twin(run.model, experiment)
    ids = peer.tokens(experiment.model.vocab_size, 2, 0)
    ours = run.executor.run(batch_of(ids), run.progress).losses["next_token"]
    theirs = other(input_ids=ids, labels=ids).loss
    theirs.backward()
    grads = peer.as_transformers({a: p.grad for a, p in run.model.named_parameters() if p.grad is not None})
    errors = [
        float((grads[name] - p.grad).norm() / p.grad.norm())
        for name, p in other.named_parameters()
        if p.grad.norm() > 0
    ]
    print(f"{size}: loss {ours:.6f} and {theirs.item():.6f}; largest relative gradient error {max(errors):.1e}")
    if abs(ours - theirs.item()) > 1e-4 or max(errors) > 1e-4:
        raise SystemExit("the two sides do not compute the same: no figure is worth printing")


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


def spread(values: list[float], form: str) -> str:
    """Return the median with the smallest and largest."""
    shown = [format(value, form) for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def main() -> None:
    """Compare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=peer.SIZES, default="19.5M")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        work(asked.side, asked.size, asked.compute, asked.batch)
        return
    compare(asked.size)
    times = list(rounds(asked.size, asked.compute, asked.batch, asked.rounds))
    tokens = asked.batch * peer.LENGTH
    machine = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{asked.size}, {asked.compute}, {asked.batch} x {peer.LENGTH}, one thread, {machine}")
    for side in SIDES:
        rate = spread([tokens / row[side] for row in times], ",.0f")
        ratio = spread([row["transformers"] / row[side] for row in times], ".2f")
        print(f"{side:28} {rate} tokens per CPU-second; {ratio} times transformers")


if __name__ == "__main__":
    main()

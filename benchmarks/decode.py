"""Decoding against `transformers`, side by side in one run.

    pip install transformers==5.23.0
    python benchmarks/decode.py [--size 19.5M] [--compute float32] [--rows 128x1 1024x1 4096x1 16384x1 128x8 ...]
    python benchmarks/decode.py --growth             # a token at 16,384 against one at 1,024
    python benchmarks/decode.py --prefill            # reading a prompt against the forward of training
    python benchmarks/decode.py --speculate RUN      # drafts of a trained run's MTP modules against none

The same model with the same random weights is built in both. For each row, CONTEXTxBATCH, both read random prompts of
that length and go on greedily; the tokens are compared first. Then each side makes some tokens in turn, by its bare
loop: `Decoder.step` here, a forward with `DynamicCache` and argmax there (`generate()` of the peer costs about twice
its loop at this size). Printed are tokens per CPU-second at one thread, the ratio round by round, the bytes of the
cache per token, and the peak memory of a process that does one side alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import peer
import torch

from tangram.core import build_model
from tangram.core.decoding import Decoder
from tangram.core.process import settle
from tangram.core.records import Batch, Progress
from tangram.core.sampling import Sampling

ROWS = ["128x1", "1024x1", "4096x1", "16384x1", "128x8", "1024x8", "4096x8"]
"""Contexts and batches."""

WARM = 10
"""Rounds of decoding with and without drafts that are not timed."""

SIDES = ("tangram", "transformers")


def ours(model, prompt: torch.Tensor, room: int) -> tuple[Callable[[], list[int]], Decoder]:  # type: ignore[no-untyped-def]
    """Return what makes the next token of each sequence, and the decoder that does."""
    decoder = Decoder(model, prompt.shape[1] + room)
    waiting = [[row[0] for row in decoder.admit(prompt.tolist(), [Sampling()] * len(prompt))]]
    return lambda: waiting.pop() if waiting else [row[0] for row in decoder.step()], decoder


def theirs(model, prompt: torch.Tensor, chunk: int = 512) -> Callable[[], list[int]]:  # type: ignore[no-untyped-def]
    """Return what makes the next token of each sequence."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    last = None

    @torch.inference_mode()
    def step() -> list[int]:
        nonlocal last
        pieces = prompt.split(chunk, 1) if last is None else [last]
        for piece in pieces:
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        last = logits[:, -1].argmax(-1, keepdim=True)
        return last[:, 0].tolist()

    return step


def both(size: str, compute: str, context: int, batch: int):  # type: ignore[no-untyped-def]
    """Return our model, the peer's, and prompts."""
    experiment = peer.experiment(size, compute, batch)
    model = build_model(experiment, seed=0)
    other = peer.twin(model, experiment)
    other.config.max_position_embeddings = max(other.config.max_position_embeddings, 2 * context)
    if compute == "bfloat16":
        peer.in_bfloat16(other)
    return model, other, peer.tokens(experiment.model.vocab_size, batch, 1, context)


def measure(size: str, compute: str, context: int, batch: int, rounds: int, tokens: int) -> dict[str, object]:
    """Return what one row came to."""
    model, other, prompt = both(size, compute, context, batch)
    mine, decoder = ours(model, prompt, (rounds + 2) * tokens + 2)
    steps = {"tangram": mine, "transformers": theirs(other, prompt)}
    made = {side: [step() for _ in range(2 * tokens)] for side, step in steps.items()}
    same = sum(a == b for a, b in zip(*(chain(*rows) for rows in made.values()), strict=True))
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in SIDES if turn % 2 else reversed(SIDES):
            began = time.process_time()
            for _ in range(tokens):
                steps[side]()
            times[side].append(tokens * batch / (time.process_time() - began))
    held = sum(len(one.tokens) - 1 for one in decoder.running)
    peaks = {side: alone(size, compute, context, batch, side) for side in SIDES}
    return {"context": context, "batch": batch, "equal tokens": f"{same} of {2 * tokens * batch}"} | {
        "tokens per CPU-second": {side: round(statistics.median(rates)) for side, rates in times.items()},
        "ratio": spread([a / b for a, b in zip(*times.values(), strict=True)]),
        "cache bytes per token": decoder.cache_bytes / held,
        "peak MiB": peaks,
    }


def spread(ratios: list[float]) -> dict[str, float]:
    """Return the least, the middle and the largest."""
    middle = statistics.median(ratios)
    return {"min": round(min(ratios), 2), "median": round(middle, 2), "max": round(max(ratios), 2)}


def alone(size: str, compute: str, context: int, batch: int, side: str) -> int:
    """Return the peak memory in MiB of a process that does one side."""
    asked = ["--size", size, "--compute", compute, "--rows", f"{context}x{batch}", "--alone", side]
    done = subprocess.run([sys.executable, __file__, *asked], capture_output=True, text=True, check=True)
    return int(done.stdout)


def do_alone(size: str, compute: str, context: int, batch: int, side: str) -> None:
    """Make some tokens with one side, and print the peak memory in MiB."""
    experiment = peer.experiment(size, compute, batch)
    prompt = peer.tokens(experiment.model.vocab_size, batch, 1, context)
    model = build_model(experiment, seed=0)
    if side == "tangram":
        step, _ = ours(model, prompt, 16)
    else:
        other = peer.twin(model, experiment)
        del model
        step = theirs(peer.in_bfloat16(other) if compute == "bfloat16" else other, prompt)
    for _ in range(8):
        step()
    # What getrusage says begins with what the parent had.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) // 1024)


def prefill(size: str, compute: str, rounds: int, length: int = 512) -> None:
    """Compare reading a prompt into the cache with the forward of training, which keeps what backward needs."""
    model, _, prompt = both(size, compute, length, 1)
    positions = torch.arange(length)[None]
    batch = Batch(prompt, None, positions, torch.zeros_like(prompt), 0, 1)

    def read() -> None:
        Decoder(model, length + 1).admit(prompt.tolist(), [Sampling()])

    def forward() -> None:
        model(batch, Progress())

    times: dict[str, list[float]] = {"prefill": [], "forward": []}
    for turn in range(rounds + 1):
        for name, fn in (("prefill", read), ("forward", forward)):
            began = time.process_time()
            fn()
            if turn:
                times[name].append(time.process_time() - began)
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    print(json.dumps({"length": length, "prefill over forward, CPU time": spread(ratios)}))


def growth(size: str, compute: str, rounds: int, tokens: int, contexts: tuple[int, int] = (1024, 16384)) -> None:
    """Compare what a token costs after many others with what it costs after few."""
    steps = []
    for context in contexts:
        model, _, prompt = both(size, compute, context, 1)
        step, _ = ours(model, prompt, (rounds + 1) * tokens + WARM)
        for _ in range(WARM):
            step()
        steps.append(step)
    ratios = []
    for _ in range(rounds):
        spent = []
        for step in steps:
            began = time.process_time()
            for _ in range(tokens):
                step()
            spent.append(time.process_time() - began)
        ratios.append(spent[1] / spent[0])
    print(json.dumps({"contexts": contexts, "CPU time of a token": spread(ratios)}))


def speculate(run: Path, rounds: int, tokens: int) -> None:
    """Compare decoding with drafts with decoding without, on held-out text."""
    from tangram.core.run import load_run

    trainer = load_run(run)
    held_out = trainer.data.held_out
    assert held_out is not None
    rows, _ = next(iter(held_out.batches(8)))
    times: dict[bool, list[float]] = {True: [], False: []}
    per_round: dict[bool, list[float]] = {True: [], False: []}
    kept = offered = 0
    for turn in range(rounds):
        prompt = rows.tokens[turn % 8, :64].tolist()
        texts = {}
        for drafts in (True, False) if turn % 2 else (False, True):
            end = 96 + tokens  # 64 of the prompt, and what the rounds before take
            decoder = Decoder(trainer.model, end + 4, speculate=drafts)
            decoder.admit([prompt], [Sampling()])
            for _ in range(WARM):
                decoder.step()
            before = len(decoder.running[0].tokens)
            steps, began = 0, time.process_time()
            while len(decoder.running[0].tokens) < end:
                decoder.step()
                steps += 1
            spent, made = time.process_time() - began, len(decoder.running[0].tokens) - before
            times[drafts].append(made / spent)
            per_round[drafts].append(spent / steps)
            texts[drafts] = decoder.running[0].tokens[:end]
            if drafts:
                kept, offered = kept + decoder.tally.accepted[0], offered + decoder.tally.offered[0]
        assert texts[True] == texts[False]
    cost = [a / b for a, b in zip(per_round[True], per_round[False], strict=True)]
    print(
        json.dumps(
            {
                "drafts kept": round(kept / offered, 3),
                "a round with drafts over one without, CPU time": spread(cost),
                "break-even acceptance": round(statistics.median(cost) - 1, 2),
                "speed with drafts over without": spread([a / b for a, b in zip(*times.values(), strict=True)]),
            }
        )
    )


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="19.5M", choices=peer.SIZES)
    parser.add_argument("--compute", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--speculate", type=Path)
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    settle()
    torch.set_num_threads(1)
    rows = [tuple(map(int, row.split("x"))) for row in asked.rows]
    if asked.alone:
        do_alone(asked.size, asked.compute, *rows[0], asked.alone)
    elif asked.growth:
        growth(asked.size, asked.compute, asked.rounds, asked.tokens)
    elif asked.prefill:
        prefill(asked.size, asked.compute, asked.rounds)
    elif asked.speculate:
        speculate(asked.speculate, asked.rounds, 10 * asked.tokens)
    else:
        for row in rows:
            print(json.dumps(measure(asked.size, asked.compute, *row, asked.rounds, asked.tokens)), flush=True)


if __name__ == "__main__":
    main()

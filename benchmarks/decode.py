"""Decoding against `transformers`, side by side in one run.

    pip install transformers==5.23.0
    python benchmarks/decode.py [--size 19.5M] [--compute float32] [--rows 128x1 1024x1 4096x1 16384x1 128x8 ...]

The same model with the same random weights is built in both. For each row, CONTEXTxBATCH, both read random prompts of
that length and go on greedily; the tokens are compared first. Then each side makes some tokens in turn, by its bare
loop: `Decoder.step` here, a forward with `DynamicCache` and argmax there (`generate()` of the peer costs about twice
its loop at this size). Printed are tokens per CPU-second at one thread, the ratio round by round, and the bytes of the
cache per token.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import peer
import torch

from tangram.core import build_model
from tangram.core.decoding import Decoder
from tangram.core.process import settle
from tangram.core.sampling import Sampling

ROWS = ["128x1", "1024x1", "4096x1", "16384x1", "128x8", "1024x8", "4096x8"]
"""Contexts and batches."""


def ours(model, prompt: torch.Tensor, room: int) -> tuple[Callable[[], list[int]], Callable[[], int]]:  # type: ignore[no-untyped-def]
    decoder = Decoder(model, prompt.shape[1] + room)
    first = decoder.admit(prompt.tolist(), [Sampling()] * len(prompt))
    queue = [[row[0] for row in first]]

    def step() -> list[int]:
        if queue:
            return queue.pop()
        return [row[0] for row in decoder.step()]

    return step, lambda: decoder.cache_bytes


def theirs(model, prompt: torch.Tensor, chunk: int = 512):  # type: ignore[no-untyped-def]
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for piece in prompt.split(chunk, 1):
            last = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    state = [last[:, -1].argmax(-1, keepdim=True)]
    queue = [state[0][:, 0].tolist()]

    def step() -> list[int]:
        if queue:
            return queue.pop()
        with torch.inference_mode():
            logits = model(input_ids=state[0], past_key_values=cache, use_cache=True).logits
            state[0] = logits[:, -1].argmax(-1, keepdim=True)
            return state[0][:, 0].tolist()

    return step


def measure(size: str, compute: str, context: int, batch: int, rounds: int, tokens: int) -> dict[str, object]:
    experiment = peer.experiment(size, compute, batch)
    model = build_model(experiment, seed=0)
    other = peer.twin(model, experiment)
    if compute == "bfloat16":
        peer.in_bfloat16(other)
    prompt = peer.tokens(experiment.model.vocab_size, batch, 1, context)
    room = (rounds + 2) * tokens + 2
    mine, cache_bytes = ours(model, prompt, room)
    other_step = theirs(other, prompt)
    same = total = 0
    for _ in range(2 * tokens):
        a, b = mine(), other_step()
        same += sum(x == y for x, y in zip(a, b, strict=True))
        total += batch
    times: dict[str, list[float]] = {"tangram": [], "transformers": []}
    for turn in range(rounds):
        sides = [("tangram", mine), ("transformers", other_step)]
        for name, step in sides if turn % 2 else reversed(sides):
            began = time.process_time()
            for _ in range(tokens):
                step()
            times[name].append(tokens * batch / (time.process_time() - began))
    ratios = [a / b for a, b in zip(times["tangram"], times["transformers"], strict=True)]
    return {
        "context": context,
        "batch": batch,
        "equal": f"{same}/{total}",
        "tangram": statistics.median(times["tangram"]),
        "transformers": statistics.median(times["transformers"]),
        "ratio": [min(ratios), statistics.median(ratios), max(ratios)],
        "bytes": cache_bytes() / (batch * (context + 2 * tokens + rounds * tokens)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="19.5M", choices=peer.SIZES)
    parser.add_argument("--compute", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=12)
    asked = parser.parse_args()
    settle()
    torch.set_num_threads(1)
    for row in asked.rows:
        context, batch = map(int, row.split("x"))
        print(json.dumps(measure(asked.size, asked.compute, context, batch, asked.rounds, asked.tokens)), flush=True)


if __name__ == "__main__":
    main()

"""Decoding where ranks share out the experts: they say what one rank says, one decoder or two side by side."""

import decoders_at_work
import pytest
import torch

from tangram.core.lanes import Lanes
from tangram.testing import run_ranks


@pytest.mark.parametrize("speculate", [False, True])
def test_ranks_and_decoders_side_by_side_continue_as_one_alone(speculate: bool) -> None:
    every = [decoders_at_work.prompts_of(rank) for rank in range(2)]
    found = run_ranks(decoders_at_work.continued, 2, 2, every, speculate)
    for prompts, (plain, together) in zip(every, found, strict=True):
        assert together == plain
        alone, _ = decoders_at_work.continued(0, 1, [prompts], speculate)
        for tokens, prompt, expected in zip(plain, prompts, alone, strict=True):
            assert tokens[: len(prompt)] == prompt
            assert tokens == expected[: len(tokens)]
            assert len(tokens) > len(prompt) + decoders_at_work.ROUNDS // 2


def test_what_sends_meets_what_computes() -> None:
    seen = []

    def work(name: str, wait: int):
        for _ in range(wait):
            yield "compute"
        for lane in ("compute", "comm", "compute", "comm") * 2:
            yield lane
            seen.append((name, lane))

    Lanes(torch.device("cpu")).side_by_side(work("a", 0), work("b", 1))
    pairs = [{lane for _, lane in seen[i : i + 2]} for i in range(1, len(seen) - 1, 2)]
    assert all(pair == {"compute", "comm"} for pair in pairs)

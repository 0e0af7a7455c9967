"""Decoding by ranks that share out the experts: imported by the processes of the test that runs it."""

import torch
from tiny import exact

from tangram.core.assembly import Seat, assemble
from tangram.core.decoding import Decoder, step_together
from tangram.core.sampling import Sampling

OVERRIDES = (
    "model.block.feedforward.dispatcher={use: all_to_all}",
    "parallel={pipeline: {use: sequential}, pipeline_ranks: 1, sharding: {use: zero1}}",
)
LENGTH, ROUNDS = 5, 6


def prompts_of(rank: int) -> list[list[int]]:
    """Return a rank's prompts, of one length as the ranks read them together; the second rank has fewer."""
    stream = torch.Generator().manual_seed(rank)
    return torch.randint(48, (4 - 2 * rank, LENGTH), generator=stream).tolist()


def continued(
    rank: int, ranks: int, every: list[list[list[int]]], speculate: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the continuations of this rank's of all prompts by one decoder, and by two that take rounds together.

    From the middle on the last rank has nothing more to do.
    """
    run = assemble(exact(*OVERRIDES, f"parallel.expert_ranks={ranks}"), Seat(rank, ranks))
    for bias in run.model.biases().values():
        bias.copy_(torch.linspace(-0.1, 0.1, len(bias)))
    prompts, room = every[rank], LENGTH + 20
    one = Decoder(run.model, room, speculate=speculate)
    two = [Decoder(run.model, room, speculate=speculate) for _ in range(2)]
    one.admit(prompts, [Sampling()] * len(prompts))
    for half, decoder in enumerate(two):
        decoder.admit(prompts[half::2], [Sampling()] * len(prompts[half::2]))
    made = (
        list(one.running),
        [each for pair in zip(*(list(each.running) for each in two), strict=True) for each in pair],
    )
    for number in range(ROUNDS):
        if number == ROUNDS // 2 and ranks > 1 and rank == ranks - 1:
            for decoder in (one, *two):
                decoder.keep([])
        one.step()
        step_together(*two)
    return tuple([each.tokens for each in way] for way in made)

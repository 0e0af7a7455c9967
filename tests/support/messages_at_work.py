"""Steps whose messages go over gloo or the strict network: imported by the processes of the tests that run them."""

from collections.abc import Mapping, Sequence
from functools import partial

import strict_network
import team_at_work
import torch
from chain import Chain, small_batch
from pipeline_at_work import PIPELINES
from team_at_work import Taken
from torch import Tensor

from tangram.core import executor, lowering
from tangram.core.channels import Channels
from tangram.core.context import Parallel
from tangram.core.executor import Executor
from tangram.core.groups import Groups
from tangram.core.layout import Layout
from tangram.core.lowering import Receive, Send, given, needed
from tangram.core.plan import forward_only
from tangram.core.records import Progress

Left = tuple[float, dict[str, Tensor]]
"""What a step left on a rank: the loss of all ranks, and the gradients of its own stages."""


def chained(
    rank: int, ranks: int, names: Sequence[str], patience: float | None = None, mutant: str = ""
) -> dict[str, list[Left]]:
    """Take steps of a chain in each pipeline, of two numbers of micro-batches, and evaluate it.

    Args:
        rank: Which this is.
        ranks: Of the pipeline.
        names: The pipelines.
        patience: That of the strict network; over gloo if left out.
        mutant: A fault to be found.
    """
    if mutant:
        MUTANTS[mutant]()
    if patience is not None:
        strict_network.join(patience)
    return {name: _steps(rank, ranks, name) for name in names}


def _steps(rank: int, ranks: int, name: str) -> list[Left]:
    schedule = partial(PIPELINES[name].schedule, ranks)
    layout = Layout(schedule(2 * ranks).place, rank=rank)
    torch.manual_seed(0)
    chain = Chain(layout.n_stages)
    parallel = Parallel(chain.queue, layout)
    steps = Executor(chain, schedule, 1, parallel, lambda: None)
    evaluation = Executor(chain, partial(forward_only, layout.place), 1, parallel, lambda: None)
    left = []
    for run, microbatches in ((steps, 2 * ranks), (steps, 3 * ranks), (evaluation, ranks)):
        chain.zero_grad()
        result = run.run(small_batch(microbatches), Progress())
        gradients = {address: p.grad.clone() for address, p in chain.named_parameters() if p.grad is not None}
        left.append((result.total, gradients))
    return left


def trained(rank: int, ranks: int, cases: Mapping[str, Sequence[str]], patience: float) -> dict[str, list[Taken]]:
    """Take two steps of the small V3 in each case, over the strict network."""
    strict_network.join(patience)
    return team_at_work.several(rank, ranks, cases)


def _one_group_both_ways() -> None:
    of = Groups.of
    Groups.of = lambda groups, ranks, name="": of(groups, ranks, name and "up")


def _nothing_opened() -> None:
    Channels.open = lambda channels, pairs: None


def _receives_as_needed() -> None:
    def instructions(plan, rank, sent):
        for action in plan.actions[rank]:
            yield from map(Receive, needed(plan, rank, action))
            yield action
            yield from (Send(out) for part in action.parts if (out := given(plan, rank, part)) is not None)

    lowering._of_rank = lambda plan, rank, sent: tuple(instructions(plan, rank, sent))
    executor.check = lambda lowered: None  # which would refuse it


MUTANTS = {
    "one group both ways": _one_group_both_ways,
    "nothing opened": _nothing_opened,
    "receives as needed": _receives_as_needed,
}

"""Two steps at an accelerator for each rank: imported by the processes of the tests that take them."""

from collections.abc import Sequence

import accelerator
import strict_network
import team_at_work
from team_at_work import Taken

PATIENCE = 60.0


def two_steps(rank: int, ranks: int, overrides: Sequence[str]) -> tuple[list[Taken], list[str]]:
    """Return what two steps left, and what this rank's streams could have run in another order."""
    accelerator.set_up()
    strict_network.join(PATIENCE, "emulated", accelerator.given_away)
    with accelerator.timeline() as done:
        return team_at_work.two_steps(rank, ranks, overrides, accelerator.DEVICE), done.faults

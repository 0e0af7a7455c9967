"""A rank that starts from another run's weights, as the tests of it have several: imported by its processes."""

from pathlib import Path

import torch

from tangram.core import load_preset
from tangram.core.assembly import Seat, assemble
from tangram.core.start import Start, source, start_from


def started(rank: int, ranks: int, preset: Path, run: Path) -> tuple[Start, dict[str, torch.Tensor], dict[str, range]]:
    """Return what it started from, what it holds then, and the experts that it holds where these are not all."""
    trainer = assemble(load_preset(preset), Seat(rank, ranks))
    start = start_from(trainer, source(run))
    return start, trainer.model.state_dict(), dict(trainer.sharding.rows())

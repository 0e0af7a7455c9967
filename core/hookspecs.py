"""Every moment of a run that a plugin may watch. Hooks observe; they return nothing and change no number.

A plugin marks an implementation with `@HOOKIMPL` and names only the arguments that it wants.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from tangram.core.model import Model
    from tangram.core.records import EvalReport, StepReport
    from tangram.core.session import RunView

HOOKSPEC = pluggy.HookspecMarker("tangram")
HOOKIMPL = pluggy.HookimplMarker("tangram")


@HOOKSPEC
def tangram_presets() -> Sequence[str | Path]:
    """Return the preset files that a package ships. The one hook of a module."""
    raise NotImplementedError


@HOOKSPEC
def tangram_run_started(run: "RunView") -> None:
    """A run starts or resumes; its directory exists, and its progress says how far it had come."""


@HOOKSPEC
def tangram_model_built(run: "RunView", model: "Model") -> None:
    """The model has its initial weights, or those of the checkpoint that is resumed."""


@HOOKSPEC
def tangram_step_ended(run: "RunView", report: "StepReport") -> None:
    """An optimizer step is over, accepted or not; of a rollback, the run stands at `report.after` again."""


@HOOKSPEC
def tangram_evaluated(run: "RunView", report: "EvalReport") -> None:
    """Held-out text was seen, in part or in full."""


@HOOKSPEC
def tangram_checkpoint_saved(run: "RunView", path: Path) -> None:
    """The checkpoint at `path` is sealed."""


@HOOKSPEC
def tangram_run_ended(run: "RunView", error: BaseException | None) -> None:
    """A run is over: None where it ended well, else what ended it."""

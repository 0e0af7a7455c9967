"""Weights & Biases as one more view of a run: never its record, never in its way."""

import os
import queue
import threading
from collections.abc import Callable, Mapping
from hashlib import sha256
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from attrs import field, frozen
from attrs.validators import in_, min_len

from tangram.core.hookspecs import HOOKIMPL
from tangram.core.presets import dump
from tangram.core.records import EvalReport, StepReport
from tangram.core.registry import component
from tangram.core.session import RunView

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled", "shared"]

_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")
"""Hosts under which `wandb login` keeps a key: since 0.31, and before."""

_INIT_TIMEOUT = 20.0
"""Seconds that a start may wait for the server."""

_FINISH_TIMEOUT = 60.0
"""Seconds that an end may wait for the upload."""

_WAITING = 10_000
"""Rows that may wait to be sent; a process that has so many unread will not read them."""

_TOLERATED = 3
"""Errors after which nothing more is sent."""


@component("observer", use="wandb")
@frozen(kw_only=True)
class WandbConfig:
    """Send the metrics to Weights & Biases, or keep them in the run directory until `wandb sync`.

    Attributes:
        project: Project in which the run is listed.
        mode: `auto` is online where an API key is found (WANDB_API_KEY or netrc), else offline; a WANDB_MODE in the
            environment always wins.
    """

    project: str = field(default="tangram", validator=min_len(1))
    mode: Literal["auto", "online", "offline", "disabled"] = field(
        default="auto", validator=in_(("auto", "online", "offline", "disabled"))
    )

    def build(self) -> "Wandb":
        """Build it."""
        return Wandb(self)


class Wandb:
    """Hands rows to wandb's own process. What goes wrong there is said once and never reaches the run.

    A thread does the handing, for that process may stop reading without an error, and then every call blocks.
    """

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self._run: wandb.Run | None = None
        self._errors = 0
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING)
        self._sender = threading.Thread(target=self._send, name="wandb", daemon=True)

    @HOOKIMPL
    def tangram_run_started(self, run: RunView) -> None:
        """Begin, or go on with, the run of this directory."""
        mode, why = chosen_mode(self.config)
        if mode == "disabled":
            return
        try:
            self._run, mode, why = self._begin(run, mode, why)
            self._run.define_metric("*", step_metric="tokens")
        except Exception as error:
            self._give_up(error)
            return
        self._sender.start()
        if mode == "offline":
            _say(f"offline ({why}); later: wandb sync {Path(self._run.dir).parent}")
        else:
            _say(f"{mode}, {self._run.url}")

    @HOOKIMPL
    def tangram_step_ended(self, report: StepReport) -> None:
        """Send the step."""
        self._log(report.metrics())

    @HOOKIMPL
    def tangram_evaluated(self, report: EvalReport) -> None:
        """Send the evaluation."""
        self._log(report.metrics())

    @HOOKIMPL
    def tangram_run_ended(self, error: BaseException | None) -> None:
        """Say how the run ended; wait a while for the upload."""
        sink = self._run
        if sink is None:
            return
        self._hand(lambda: sink.finish(exit_code=int(error is not None)))
        self._hand(None)
        self._sender.join(_FINISH_TIMEOUT)
        if self._sender.is_alive() and self._run is not None:
            self._give_up(TimeoutError("its process does not answer"))
            _end_process()

    def _begin(self, run: RunView, mode: Mode, why: str) -> "tuple[wandb.Run, Mode, str]":
        """Return the run that was begun and its mode: offline where the server does not answer."""
        if mode != "offline":
            try:
                return self._init(run, mode), mode, why
            except ImportError:
                raise
            except Exception as error:
                mode, why = "offline", _first_line(error)
                _end_process()  # it still holds the run's id
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # without it, offline still asks for an address
        return self._init(run, mode), mode, why

    def _init(self, run: RunView, mode: Mode) -> "wandb.Run":
        import wandb

        directory = run.directory.resolve()
        return wandb.init(
            project=self.config.project,
            id=sha256(str(directory).encode()).hexdigest()[:16],  # a resumed run goes on under it
            name=directory.name,
            dir=directory,
            config=dump(run.experiment),
            mode=mode,
            resume="allow",
            settings=wandb.Settings(
                init_timeout=_INIT_TIMEOUT,
                finish_timeout=_FINISH_TIMEOUT,
                finish_timeout_raises=False,
                console="off",
                silent=True,
            ),
        )

    def _log(self, row: Mapping[str, float | int | str | bool]) -> None:
        sink = self._run
        if sink is not None:
            self._hand(lambda: sink.log(dict(row)))

    def _hand(self, call: Callable[[], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(TimeoutError("its process does not answer"))
            _end_process()

    def _send(self) -> None:
        """Make the calls in order, until there is none or wandb is given up."""
        while self._run is not None and (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                self._errors += 1
                if self._errors >= _TOLERATED:
                    self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        missing = isinstance(error, ImportError)
        why = "it is not installed: pip install 'tangram-lm[wandb]'" if missing else _first_line(error)
        _say(f"off for the rest of this run ({why}); metrics.jsonl is the record")


def _end_process() -> None:
    """End wandb's process, or let this one end without it: else it waits for it, however long that takes."""
    import wandb

    ending = threading.Thread(target=wandb.teardown, daemon=True)
    ending.start()
    ending.join(1.0)  # its first act is to cancel the waiting at exit


def chosen_mode(config: WandbConfig) -> tuple[Mode, str]:
    """Return the mode of a run, and why it is that one."""
    asked = os.environ.get("WANDB_MODE", "")
    for mode, origin in ((asked, "WANDB_MODE"), (config.mode, "the preset")):
        known: tuple[Mode, ...] = ("online", "offline", "disabled", "shared")
        for each in known:
            if mode == each:
                return each, f"{origin} says so"
    return ("online", "an API key was found") if has_key() else ("offline", "no API key")


def has_key() -> bool:
    """Return whether the environment or netrc holds an API key for the server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    asked = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(asked).netloc,) if asked else _HOSTS
    try:
        keys = netrc(os.environ.get("NETRC") or str(Path.home() / ".netrc"))
        return any(keys.authenticators(host) is not None for host in hosts)
    except (OSError, NetrcParseError, RuntimeError):  # none there, not readable, or no home
        return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _say(line: str) -> None:
    print(f"wandb: {line}", flush=True)

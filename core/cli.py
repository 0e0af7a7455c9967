"""The command line. Commands are thin: they read, call the core and print; torch is imported inside them."""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError, Parameter

from tangram.core.asked import building, discover, look_up
from tangram.core.cli_describe import describe
from tangram.core.cli_generate import generate
from tangram.core.cli_interchange import export, import_
from tangram.core.cli_plugins import check_plugin, new_plugin
from tangram.core.cli_runs import evaluate, report
from tangram.core.cli_schedule import schedule
from tangram.core.cli_serve import serve
from tangram.core.cli_studies import ablate
from tangram.core.parameters import Files, Json, Overrides
from tangram.core.process import settle
from tangram.core.terminal import (
    BROKEN,
    FAILED,
    KILLED,
    OK,
    STOPPED,
    USAGE,
    as_json,
    fail,
    print_outcome,
    refuse,
    say,
    table,
    words,
)


def _version() -> str:
    from importlib.metadata import version

    return version("tangram-lm")


app = App(
    name="tangram",
    help="DeepSeek-V3 as a composition of swappable pieces: compose, train, ablate.",
    help_format="plaintext",  # as markdown, <name> would vanish, and its parser takes a quarter of the time
    version=_version,
    version_flags=["--version"],
    default_parameter=Parameter(negative="", show_default=False),
)

app.register_install_completion_command(help="Install completion for your shell: bash, zsh or fish.")


@app.command(name="list")
def list_(slot: str | None = None, /, *, json_: Json = False, plugin: Files = ()) -> int:
    """List the components of every slot, or of one, and the presets.

    Args:
        slot: Only this slot.
    """
    from tangram.core.contracts import SLOTS
    from tangram.core.presets import available
    from tangram.core.schema import paper, summary

    if slot is not None and slot not in SLOTS:
        return refuse(f"there is no slot '{slot}'; the slots are {', '.join(SLOTS)}")
    plugins = discover(plugin)
    entries = [entry for entry in plugins.registry if slot in (None, entry.mark.slot)]
    presets = available(plugins) if slot is None else {}
    if json_:
        return as_json(
            {
                "components": [
                    {
                        "slot": entry.mark.slot,
                        "use": entry.mark.use,
                        "summary": summary(entry.config),
                        "paper": paper(entry.config),
                        "origin": entry.origin,
                    }
                    for entry in entries
                ],
                "presets": {name: str(path) for name, path in presets.items()},
                "broken": [{"name": b.name, "origin": b.origin, "error": b.error} for b in plugins.broken],
                "remarks": [{"name": r.name, "origin": r.origin, "text": r.text} for r in plugins.remarks],
            }
        )
    rows = [(e.mark.slot, e.mark.use, summary(e.config), paper(e.config), e.origin) for e in entries]
    table(("slot", "use", "what it does", "paper", "origin"), rows)
    if presets:
        say("")
        table(("preset", "file"), [(name, str(path)) for name, path in presets.items()])
    for broken in plugins.broken:
        say(f"broken: {broken}")
    for remark in plugins.remarks:
        say(f"remark: {remark}")
    return OK


@app.command
def show(preset: str, /, *overrides: Overrides, origin: bool = False, json_: Json = False, plugin: Files = ()) -> int:
    """Show a preset resolved, every default spelled out.

    Args:
        preset: Name or file.
        origin: Show where each value comes from.
    """
    from tangram.core.presets import dump, flatten, to_yaml

    resolved = look_up(preset, overrides, plugin)
    if origin:
        leaves = flatten(resolved.experiment)
        origins = {path: str(resolved.origins[path]) for path in leaves}
        if json_:
            return as_json({path: {"value": leaves[path], "origin": origins[path]} for path in leaves})
        width = max(map(len, leaves))
        for path, value in leaves.items():
            say(f"{path:{width}}  {json.dumps(value)}  # {origins[path]}")
        return OK
    if json_:
        return as_json(dump(resolved.experiment))
    say(to_yaml(resolved.experiment).rstrip())
    return OK


@app.command
def diff(a: str, b: str, /, *, json_: Json = False, plugin: Files = ()) -> int:
    """Show where two presets differ, resolved.

    Args:
        a: Name or file.
        b: Name or file.
    """
    from tangram.core.presets import difference

    changes = difference(look_up(a, (), plugin).experiment, look_up(b, (), plugin).experiment)
    if json_:
        return as_json({path: {"a": before, "b": after} for path, (before, after) in changes.items()})
    rows = [(path, json.dumps(before), json.dumps(after)) for path, (before, after) in changes.items()]
    table(("path", a, b), rows) if rows else say("no difference")
    return OK


@app.command
def copy(preset: str, file: Path, /, *, plugin: Files = ()) -> int:
    """Copy a preset to a file of your own, to edit.

    Args:
        preset: Name or file.
        file: Where to; it must not be there yet.
    """
    resolved = look_up(preset, (), plugin)
    if file.exists():
        return refuse(f"{file} is there already; choose another name")
    if not file.parent.is_dir():
        return refuse(f"there is no folder {file.parent}")
    text = resolved.file.read_text(encoding="utf-8")
    schema = resolved.file.with_name("schema.json").resolve()
    file.write_text(text.replace("$schema=schema.json", f"$schema={schema}", 1), encoding="utf-8")
    say(f"{file}: a copy of {resolved.file}; change it and run `tangram train {file}`")
    return OK


@app.command
def schema(*, json_: Json = False, plugin: Files = ()) -> int:
    """Print the JSON schema of presets, with which editors complete and check them; --json prints it on one line."""
    from tangram.core.preset_schema import preset_schema

    say(json.dumps(preset_schema(discover(plugin).registry), indent=None if json_ else 1))
    return OK


@app.command
def check(
    preset: str, /, *overrides: Overrides, ranks: int | None = None, json_: Json = False, plugin: Files = ()
) -> int:
    """Check a preset: resolve it, build the whole experiment without weights, and lay out its ranks and steps.

    Args:
        preset: Name or file.
        ranks: Ranks to check it for; by default pipeline_ranks times expert_ranks.
    """
    from tangram.core.assembly import rehearse
    from tangram.core.measure import measure

    resolved = look_up(preset, overrides, plugin)
    measures = building(resolved, lambda: measure(resolved.experiment))
    found = building(resolved, lambda: rehearse(resolved.experiment, ranks))
    if json_:
        told = {"name": resolved.experiment.name, "ok": True, "ranks": found.ranks, "remarks": list(found.remarks)}
        return as_json(told | {"steps": found.steps} | measures.as_dict())
    say(
        f"{resolved.experiment.name}: fine; {measures.parameters.total:,} parameters, "
        f"{measures.parameters.active:,} active, {found.steps:,} steps"
    )
    if found.ranks > 1:
        say(f"{found.ranks:,} ranks, each with {found.least:,} to {found.most:,} parameters")
    for remark in found.remarks:
        print(f"warning: {remark}", file=sys.stderr)
    return OK


@app.command
def tokenize(preset: str, folder: Path, /, *overrides: Overrides, plugin: Files = ()) -> int:
    """Write a preset's text as tokens, to train on with data={use: tokens, folder: FOLDER}.

    Args:
        preset: Name or file.
        folder: Where to; it must not be there yet.
    """
    from tangram.core.context import built
    from tangram.core.contracts import Writable

    resolved = look_up(preset, overrides, plugin)
    asked = resolved.experiment
    data = building(resolved, lambda: built("data", asked.data.build, asked.train, asked.model.vocab_size))
    if not isinstance(data, Writable):
        return refuse(f"the data of {asked.name} makes its tokens up; tokenize a preset whose data is text")
    try:
        data.write(folder)
    except ValueError as error:
        return refuse(str(error))
    override = f"data={{use: tokens, folder: {folder}}}"
    say(f"{folder}: the tokens of {asked.name}; train on them with `tangram train {preset} '{override}'`")
    return OK


@app.command
def train(
    preset: str,
    /,
    *overrides: Overrides,
    out: Path | None = None,
    resume: bool = False,
    nproc: int = 1,
    plugin: Files = (),
) -> int:
    """Train a preset into a run directory.

    Args:
        preset: Name or file.
        out: The run directory; by default runs/<name>-<hash>.
        resume: Go on from the newest checkpoint there.
        nproc: Processes of this machine to train in, started again if one dies; across machines use torchrun.
    """
    from tangram.core.assembly import data_ranks_of
    from tangram.core.contracts import NonFiniteError
    from tangram.core.interruption import RunInterruptedError
    from tangram.core.launch import launch, leave, take_seat
    from tangram.core.provenance import is_run
    from tangram.core.run import directory_of, resumable
    from tangram.core.run import train as run

    resolved = look_up(preset, overrides, plugin)
    experiment, origins = resolved.experiment, resolved.origins
    directory, files = directory_of(experiment, out), (*plugin, *map(Path, experiment.plugins))
    if nproc > 1:
        building(resolved, lambda: data_ranks_of(experiment, nproc))
        if is_run(directory) and not resume:
            return refuse(f"{directory} holds a run already; continue it with --resume or choose another --out")
        if resume:
            resumable(directory)  # what is wrong with it is said once
        flags = ["--out", str(directory), *(["--resume"] if resume else [])]
        flags += [text for file in plugin for text in ("--plugin", str(file))]
        return launch(["train", preset, *overrides, *flags], nproc)
    seat = take_seat()
    resume = resume or (seat.lives > 0 and is_run(directory))
    found = resumable(directory) if resume and seat.leads else None
    if not seat.leads:
        pass
    elif found is not None:
        refused = "".join(f"\n  passed over {why}" for why in found.refused)
        say(f"resuming from {found.path}, the newest checkpoint that is whole{refused}")
    elif resume:
        say(f"{directory} has no checkpoint yet: starting from the first step")
    try:
        outcome = building(
            resolved, lambda: run(experiment, directory, resume=found or resume, origins=origins, seat=seat)
        )
    except RunInterruptedError as error:
        if seat.leads:
            print(error, file=sys.stderr)
        return leave(STOPPED)
    except NonFiniteError as error:
        if seat.leads:
            _draw(directory, files)
            fail(f"stopped before the update of {error}")
        return leave(FAILED)
    except OSError as error:
        return leave(fail(f"the run could not go on: {error}; --resume goes on from its last checkpoint"))
    if not seat.leads:
        return OK
    _draw(directory, files)
    print_outcome(outcome)
    if outcome.dead:
        return fail("\n".join(f"{piece.name} had no effect: {piece.why}" for piece in outcome.dead))
    return OK


def _draw(directory: Path, files: Sequence[Path]) -> None:
    """Write the report of a run that is over. What goes wrong here is no fault of the run."""
    from tangram.core.pages import write_report

    try:
        write_report(directory, files)
    except Exception as error:
        print(f"warning: no report was drawn ({error}); `tangram report {directory}` tries again", file=sys.stderr)


@app.command
def doctor(*, json_: Json = False, plugin: Files = ()) -> int:
    """Say what is installed, which plugins load, and what this machine can do."""
    from tangram.core.doctor import examine

    findings = examine(discover(plugin))
    if json_:
        return as_json(findings)
    table(("what", "found"), [(name, words(value)) for name, value in findings.items()])
    return OK


app.command(describe)
app.command(evaluate)
app.command(generate)
app.command(report)
app.command(new_plugin)
app.command(export)
app.command(import_, name="import")
app.command(ablate)
app.command(check_plugin)
app.command(schedule)
app.command(serve)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code. A user's mistake is one line or a few, never a traceback."""
    settle()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            code = app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        sys.exit(USAGE)
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(KILLED)
    except Exception as error:
        known = _exit_code(error)
        if known is None:
            raise
        sys.exit(_parted(known, str(error)))
    sys.exit(code if isinstance(code, int) else OK)


def _parted(code: int, why: str) -> int:
    """Say why, and return the code; of several ranks one speaks, and one that alone fails lets no other wait."""
    if "WORLD_SIZE" not in os.environ:
        print(why, file=sys.stderr)
        return code
    from tangram.core.launch import leave

    return leave(code, why)


def _exit_code(error: Exception) -> int | None:
    from tangram.core.config import ConfigError
    from tangram.core.plugins import PluginError

    if isinstance(error, ConfigError):
        return USAGE
    if isinstance(error, PluginError):
        return BROKEN
    from tangram.core.checkpoint import CheckpointError
    from tangram.core.context import BuildError
    from tangram.core.session import RunError
    from tangram.kernels.backend import BackendError

    if isinstance(error, RunError | BuildError | BackendError):
        return USAGE
    return FAILED if isinstance(error, CheckpointError) else None


if __name__ == "__main__":
    main()

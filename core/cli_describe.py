"""The command `describe`: a component, or what a preset costs; torch is imported inside it."""

from collections.abc import Sequence
from pathlib import Path

from tangram.core.asked import building, discover, look_up
from tangram.core.parameters import Files, Json, Overrides
from tangram.core.terminal import OK, as_json, refuse, say, table


def describe(
    what: str, use: str | None = None, /, *overrides: Overrides, json_: Json = False, plugin: Files = ()
) -> int:
    """Describe a component (SLOT USE), or what a preset costs (PRESET).

    Args:
        what: A slot, or a preset's name or file.
        use: The component's name, if `what` is a slot.
    """
    from tangram.core.config import suggest
    from tangram.core.contracts import SLOTS

    if what in SLOTS:
        return _describe_component(what, use, json_, plugin)
    if use is not None and "=" not in use:
        return refuse(f"there is no slot '{what}'{suggest(what, SLOTS)}")
    slots = [entry.mark.slot for entry in discover(plugin).registry if entry.mark.use == what]
    if slots:
        return refuse(f"'{what}' is a component: tangram describe {slots[0]} {what}")
    changes = overrides if use is None else (use, *overrides)
    return _describe_preset(what, changes, json_, plugin)


def _describe_component(slot: str, use: str | None, json_: bool, plugin: Sequence[Path]) -> int:
    from tangram.core.config import suggest
    from tangram.core.schema import fields, paper, summary

    registry = discover(plugin).registry
    known = registry.uses(slot)
    if use is None:
        return refuse(f"say which {slot}: {', '.join(known)}")
    entry = registry.get(slot, use)
    if entry is None:
        return refuse(f"there is no {slot} '{use}'{suggest(use, known)}")
    described = fields(entry.config)
    if json_:
        rows = [{"name": f.name, "type": f.type, "default": f.default, "doc": f.doc} for f in described]
        what = {"slot": slot, "use": use, "summary": summary(entry.config), "paper": paper(entry.config)}
        return as_json(what | {"origin": entry.origin, "fields": rows})
    cited = paper(entry.config)
    say(f"{slot} '{use}' ({entry.origin}): {summary(entry.config)}" + (f" [{cited}]" if cited else ""))
    table(("field", "type", "default", "meaning"), [(f.name, f.type, f.default, f.doc) for f in described])
    return OK


def _describe_preset(preset: str, overrides: Sequence[str], json_: bool, plugin: Sequence[Path]) -> int:
    from tangram.core.activations import UnpredictableError, predict
    from tangram.core.measure import measure

    resolved = look_up(preset, overrides, plugin)
    experiment = resolved.experiment
    measures = building(resolved, lambda: measure(experiment)).as_dict()
    predicted: dict[str, int] | str
    try:
        predicted = building(resolved, lambda: predict(experiment))
    except UnpredictableError as error:
        predicted = f"not predicted, for a forward without values fails: {error}"
    if json_:
        kept = predicted if isinstance(predicted, dict) else None
        return as_json({"name": experiment.name} | measures | {"activation_bytes": kept})
    parameters = measures.pop("parameters")
    assert isinstance(parameters, dict)
    rows = [(f"parameters.{name}", f"{count:,}") for name, count in parameters.items()]
    rows += [(name, f"{value:,}") for name, value in measures.items()]
    if isinstance(predicted, dict):
        rows += [(f"activation_bytes.{name}", f"{value:,}") for name, value in predicted.items()]
        micro = f"a micro-batch of {experiment.train.micro_sequences} x {experiment.train.sequence_length} tokens"
        predicted = f"what the forward of {micro} keeps for backward, by model.recompute"
    table((experiment.name, ""), rows)
    say(f"activation_bytes: {predicted}")
    return OK

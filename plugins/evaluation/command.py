"""`tangram evaluate` with tasks, a needle or positions: evaluates, prints, and writes into the run's directory."""

from collections.abc import Sequence
from pathlib import Path

from attrs import asdict, evolve

from tangram.core.context import built
from tangram.core.run import load_run
from tangram.core.scores import NeedleGrid, PositionLosses, TaskScore, write_grid, write_positions, write_score
from tangram.core.step import Trainer
from tangram.core.terminal import OK, as_json, fail, refuse, say, table
from tangram.plugins.evaluation.harness import TaskError, check, load, scores
from tangram.plugins.evaluation.needle import DEPTHS, PLACES, grid, needle, shortest
from tangram.plugins.evaluation.positions import by_position
from tangram.plugins.evaluation.scoring import Scorer


def evaluate(
    run: Path,
    tasks: Sequence[str],
    lengths: Sequence[int] | None,
    length: int | None,
    averaged: bool,
    print_json: bool,
    plugins: Sequence[Path],
) -> int:
    """Evaluate a run on tasks, if `lengths` are given on hidden facts, and if a `length` is by position up to it.

    Without any lengths, facts are hidden in texts of up to what it was trained on.

    Raises:
        RunError: There is no run, no checkpoint, or no average.
        CheckpointError: No checkpoint is whole.
        ForeignCodeError: The run needs plugin files that are not in `plugins`.
    """
    try:
        if tasks:
            check(tasks)
        trainer = load_run(run, averaged=averaged, plugins=plugins)
        if trainer.data.tokenizer is None:
            return refuse(f"{run} was trained on tokens that stand for no text: this needs a tokenizer")
        scorer = Scorer(trainer.model, trainer.data.tokenizer, trainer.experiment.train.sequence_length)
        weights, step = "averaged" if averaged else "last", trainer.progress.step
        found = scores(scorer, load(tasks), weights, step) if tasks else []
        hidden = None if lengths is None else _hidden(trainer, scorer, lengths, weights)
        placed = None if length is None else _placed(trainer, scorer, length, weights)
    except TaskError as error:
        return refuse(str(error))
    try:
        written = [write_score(run, score) for score in found]
        written += [write_grid(run, hidden)] if hidden else []
        written += [write_positions(run, placed)] if placed else []
    except OSError as error:
        return fail(f"the results could not be written: {error}")
    if print_json:
        told = {"weights": weights, "step": step, "tasks": [asdict(score) for score in found]}
        told |= {"needle": asdict(hidden)} if hidden else {}
        return as_json(told | ({"positions": asdict(placed)} if placed else {}))
    say(f"step {step}, {weights} weights")
    if found:
        _print_scores(found)
    if hidden:
        _print_grid(hidden)
    if placed:
        _print_positions(placed)
    for path in written:
        say(f"written to {path}")
    return OK


def _hidden(trainer: Trainer, scorer: Scorer, wanted: Sequence[int], weights: str) -> NeedleGrid:
    """Return the grid of these lengths, or of quarters of the sequence length.

    Raises:
        TaskError: A length has no room for a fact.
    """
    least = shortest([needle(place, scorer.tokenizer) for place in PLACES])
    quarters = sorted({max(least, scorer.length * i // 4) for i in range(1, 5)})
    lengths = sorted(set(wanted)) or [length for length in quarters if length <= scorer.length]
    if not lengths or lengths[0] < least:
        short = f"{lengths[0]} tokens have" if lengths else f"the {scorer.length} tokens of the run's sequences have"
        raise TaskError(f"{short} no room for a hidden fact, a question and an answer: {least} are the least")
    if lengths[-1] > scorer.length:
        scorer.remark(f"contexts of {lengths[-1]} tokens are longer", "positions there are new to it")
    shares, text = grid(scorer, trainer.data, lengths)
    return NeedleGrid(
        weights=weights,
        step=trainer.progress.step,
        text=text,
        trained=scorer.length,
        needles=len(PLACES),
        lengths=tuple(lengths),
        depths=DEPTHS,
        scores=tuple(map(tuple, shares)),
    )


def _placed(trainer: Trainer, scorer: Scorer, length: int, weights: str) -> PositionLosses:
    """Return the losses by position of held-out text in sequences of this length.

    Raises:
        TaskError: There is no such sequence.
    """
    if length < 2:
        raise TaskError("--positions is the length of a sequence: at least 2")
    asked = trainer.experiment
    longer = evolve(asked.train, sequence_length=length)
    held_out = built("data", asked.data.build, longer, asked.model.vocab_size).held_out
    if held_out is None:
        raise TaskError("nothing was held out: --positions needs held-out text")
    if length > scorer.length:
        scorer.remark(f"sequences of {length} tokens are longer", "positions there are new to it")
    stops, targets, losses = zip(*by_position(scorer, held_out, length), strict=True)
    return PositionLosses(
        weights=weights,
        step=trainer.progress.step,
        trained=scorer.length,
        stops=stops,
        targets=targets,
        losses=losses,
    )


def _print_scores(found: Sequence[TaskScore]) -> None:
    rows = [
        (
            score.task,
            str(score.items),
            str(score.shots),
            metric.name,
            "" if metric.value is None else f"{metric.value:.4f}",
            "" if metric.error is None else f"{metric.error:.4f}",
        )
        for score in found
        for metric in score.metrics
    ]
    table(("task", "items", "shots", "metric", "value", "standard error"), rows)


def _print_grid(hidden: NeedleGrid) -> None:
    say(f"facts repeated, of {hidden.needles} hidden in {hidden.text} text at each place")
    rows = [
        (f"{depth:.0%}", *(f"{round(share * hidden.needles)}" for share in row))
        for depth, row in zip(hidden.depths, hidden.scores, strict=True)
    ]
    table(("depth", *(f"{length} tokens" for length in hidden.lengths)), rows)


def _print_positions(placed: PositionLosses) -> None:
    say("held-out text by position, nats per token")
    rows = []
    begin = 0
    for stop, targets, loss in zip(placed.stops, placed.targets, placed.losses, strict=True):
        rows.append((f"{begin:,} to {stop - 1:,}", f"{targets:,}", f"{loss:.4f}"))
        begin = stop
    table(("positions", "targets", "loss"), rows)

"""`tangram evaluate` with tasks or a needle: evaluates, prints, and writes into the run's directory."""

from collections.abc import Sequence
from pathlib import Path

from attrs import asdict

from tangram.core.run import load_run
from tangram.core.scores import NeedleGrid, TaskScore, write_grid, write_score
from tangram.core.step import Trainer
from tangram.core.terminal import OK, as_json, fail, refuse, say, table
from tangram.plugins.evaluation.harness import TaskError, check, load, scores
from tangram.plugins.evaluation.needle import DEPTHS, PLACES, grid, needle, shortest
from tangram.plugins.evaluation.scoring import Scorer


def evaluate(
    run: Path,
    tasks: Sequence[str],
    lengths: Sequence[int] | None,
    averaged: bool,
    print_json: bool,
    plugins: Sequence[Path],
) -> int:
    """Evaluate a run on tasks, and if lengths are given on hidden facts; without any lengths, up to what it knows.

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
            return refuse(f"{run} was trained on tokens that stand for no text: tasks and needles need a tokenizer")
        scorer = Scorer(trainer.model, trainer.data.tokenizer, trainer.experiment.train.sequence_length)
        weights, step = "averaged" if averaged else "last", trainer.progress.step
        found = scores(scorer, load(tasks), weights, step) if tasks else []
        hidden = None if lengths is None else _hidden(trainer, scorer, lengths, weights)
    except TaskError as error:
        return refuse(str(error))
    try:
        written = [write_score(run, score) for score in found] + ([write_grid(run, hidden)] if hidden else [])
    except OSError as error:
        return fail(f"the results could not be written: {error}")
    if print_json:
        told = {"weights": weights, "step": step, "tasks": [asdict(score) for score in found]}
        return as_json(told | ({"needle": asdict(hidden)} if hidden else {}))
    say(f"step {step}, {weights} weights")
    if found:
        _print_scores(found)
    if hidden:
        _print_grid(hidden)
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

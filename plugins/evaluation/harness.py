"""Tasks of lm-evaluation-harness, with our own model class. What needs the library imports it: that takes seconds."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tangram.core.reports import number
from tangram.core.sampling import Sampling
from tangram.core.scores import NEEDLE, POSITIONS, Metric, TaskScore
from tangram.plugins.evaluation.scoring import Scorer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

Loaded: TypeAlias = Any
"""Tasks and groups of tasks as the library has them; it is not typed for others."""

_SETTINGS = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_SEED = 1234  # of the worked examples; the library's

_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_TOKENS = 256  # the library's
_DRAWS = ("top_k", "top_p", "min_p", "repetition_penalty")


class TaskError(Exception):
    """A task cannot be evaluated; the message names it and says why."""


def check(tasks: Sequence[str]) -> None:
    """Look whether the library and the files of tasks are there, before anything takes time.

    Raises:
        TaskError: They are not.
    """
    for task in tasks:
        if _is_file(task) and not Path(task).exists():
            raise TaskError(f"there is no task file {task}")
    if find_spec("lm_eval") is None:
        raise TaskError("tasks need lm-evaluation-harness: pip install 'tangram-lm[eval]'")


def _is_file(task: str) -> bool:
    path = Path(task)
    return path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1


def load(tasks: Sequence[str]) -> Loaded:
    """Return tasks by their files, the folders that they are in, or the names that the library knows.

    Nothing is downloaded unless HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 are set. A task's data files are looked
    for from the folder of its own file.

    Raises:
        TaskError: A task is not known, its file is broken, its data are not there, or it runs what the model writes.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is told in one line, by us
    paths = [Path(task) for task in tasks if _is_file(task)]
    named = [task for task in tasks if not _is_file(task)]
    found = [loaded for path in paths for loaded in _from_path(path)]
    if named:
        manager = TaskManager()
        for task in named:
            if task not in manager.all_tasks:
                raise TaskError(f"lm-evaluation-harness knows no task {task}, and there is no such file")
            found.append(_load(manager, task, task, Path()))
    names = [name for loaded in found for name in (*loaded["tasks"], *loaded["groups"])]
    for name in names:
        if names.count(name) > 1 or name in (NEEDLE, POSITIONS):
            raise TaskError(f"the name {name} is taken: give each task another")
    whole = {part: {k: v for loaded in found for k, v in loaded[part].items()} for part in found[0]}
    for name, task in whole["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise TaskError(f"{name} runs code that the model writes, or shows it pictures: neither is done here")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_SEED)
    return whole


def _from_path(path: Path) -> Iterator[Loaded]:
    """Yield the task of a file, or those of all files in a folder."""
    import yaml
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    files = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml")) if path.is_dir() else [path]
    manager = TaskManager(include_defaults=False)
    found = False
    for file in files:
        try:
            asked = load_yaml(file, resolve_func=False)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise TaskError(f"{file}{line}: broken YAML: {error.problem or error.context}") from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TaskError(f"{file}: {_line(error)}") from None
        if isinstance(asked.get("task"), str) and "group" not in asked:
            found = True
            yield _load(manager, str(file.resolve()), str(file), file.parent)
        elif not path.is_dir():
            raise TaskError(f"{file}: no `task: NAME`; a file describes one task")
    if not found:
        raise TaskError(f"{path}: no .yaml file in it describes a task")


def _load(manager: Any, spec: str, name: str, folder: Path) -> Loaded:
    try:
        with chdir(folder):
            return manager.load(spec)
    except Exception as error:  # a task may be anyone's, code of theirs and data of all kinds among it
        raise TaskError(f"{name}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    """Return an error, and what it came from, in one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return f"{said} ({_line(error.__cause__)})" if error.__cause__ is not None else said


def model_of(scorer: Scorer) -> "LM":
    """Return what the library asks about texts."""
    from lm_eval.api.model import LM

    class Tangram(LM):
        """A model of ours, as the library knows models."""

        def loglikelihood(self, requests: "list[Instance]") -> list[tuple[float, bool]]:
            return list(scorer.continuations([request.args for request in requests]))

        def loglikelihood_rolling(self, requests: "list[Instance]") -> list[float]:
            return scorer.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: "list[Instance]") -> list[str]:
            return scorer.continued(
                [_request(scorer, *request.args, seed=seed) for seed, request in enumerate(requests)]
            )

    return Tangram()


def _request(scorer: Scorer, prompt: str, wanted: Mapping[str, Any], *, seed: int) -> Any:
    """Return a request in the words of the library as one of ours.

    Raises:
        TaskError: It wants what generation here does not have.
    """
    asked = {name: value for name, value in wanted.items() if value is not None}
    until = asked.pop("until", [])
    tokens = [int(asked.pop(name)) for name in _TOKENS if name in asked]
    temperature = float(asked.pop("temperature", 1.0))
    draws = {name: asked.pop(name) for name in _DRAWS if name in asked}
    if not asked.pop("do_sample", False):
        temperature, draws = 0.0, {}
    if asked:
        raise TaskError(f"a task asks for {', '.join(asked)}, which generation here does not have")
    sampling = Sampling(temperature=temperature, seed=seed, **draws)
    stop = [text for text in ([until] if isinstance(until, str) else until) if text]
    return scorer.asked(prompt, tokens[0] if tokens else _DEFAULT_TOKENS, stop, sampling)


def scores(scorer: Scorer, tasks: Loaded, weights: str, step: int) -> list[TaskScore]:
    """Return what the model scores on loaded tasks.

    Raises:
        TaskError: A task asks for what generation here does not have.
    """
    from lm_eval import evaluate

    found = evaluate(model_of(scorer), tasks, bootstrap_iters=1000, log_samples=False)
    return [
        TaskScore(
            task=name,
            weights=weights,
            step=step,
            items=int(found["n-samples"].get(name, {}).get("effective", 0)),
            shots=int(found["n-shot"].get(name) or 0),
            metrics=tuple(_metrics(row)),
        )
        for name, row in found["results"].items()
    ]


def _metrics(row: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield the numbers of a task; the library's keys are `metric,filter` and `metric_stderr,filter`."""
    for key, value in row.items():
        name, comma, kept = key.partition(",")
        if comma and not name.endswith("_stderr"):
            error = number(row.get(f"{name}_stderr,{kept}"))
            yield Metric(name if kept == "none" else f"{name} ({kept})", number(value), error)

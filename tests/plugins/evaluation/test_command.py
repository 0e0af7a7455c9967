"""`tangram evaluate` with tasks, needles and positions. What needs lm-evaluation-harness runs where it is."""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from scored import LENGTH, run
from tiny import tiny

from tangram.core.cli import main
from tangram.core.pages import page
from tangram.core.reports import read_run
from tangram.core.run import train
from tangram.plugins.evaluation import harness

TASKS = Path(__file__).parents[3] / "examples/tasks"
WITH_HARNESS = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-evaluation-harness takes longer to install than all else in development"
)
TASK = """
task: small
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
"""


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exited:
        main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(exited.value.code or 0), out, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line that a command says which is refused."""
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (2, ""), err
    lines = [line for line in err.splitlines() if line.strip() and "it/s]" not in line]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return Path(shutil.copytree(run(), tmp_path / "run"))


def test_a_needle_is_tried_kept_and_drawn(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, here, "--needle", "--needle-lengths", 160, 120, "--json")
    assert code == 0, err
    assert f"longer than the {LENGTH} tokens that the run was trained on" in err
    told = json.loads(out)
    assert (told["step"], told["weights"], told["tasks"]) == (2, "last", [])
    assert told["needle"]["lengths"] == [120, 160]
    assert json.loads((here / "evaluations/needle.json").read_text()) == told["needle"]
    code, out, _ = command(capsys, here, "--needle-lengths", 120, "--ema")
    assert code == 0
    assert "step 2, averaged weights" in out
    assert "120 tokens" in out
    assert (here / "evaluations/needle.averaged.json").exists()
    assert len(read_run(here).grids) == 2
    text = page(read_run(here))
    assert "Needle in a haystack, averaged weights" in text
    assert "Needle in a haystack, last weights" in text


def test_a_context_without_room_for_a_fact_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for length in (50, 0, -1):
        told = refused(capsys, here, "--needle-lengths", 200, length)
        assert f"{length} tokens have no room for a hidden fact, a question and an answer" in told
    assert not (here / "evaluations").exists()


def test_losses_by_position_are_told_kept_and_drawn(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, here, "--positions", 150, "--json")
    assert code == 0, err
    assert f"longer than the {LENGTH} tokens that the run was trained on" in err
    told = json.loads(out)["positions"]
    assert told["stops"] == [64, 128, 150]
    assert json.loads((here / "evaluations/positions.json").read_text()) == told
    code, out, _ = command(capsys, here, "--positions", LENGTH, "--ema")
    assert code == 0
    assert f"0 to {LENGTH - 1}" in out
    text = page(read_run(here))
    assert "Loss by position, last weights" in text
    assert "Loss by position, averaged weights" in text


def test_sequences_that_cannot_be_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for length in (1, 0, -5):
        assert refused(capsys, here, "--positions", length) == "--positions is the length of a sequence: at least 2"
    assert "less than one sequence of 1000000 + 1" in refused(capsys, here, "--positions", 1_000_000)
    assert not (here / "evaluations").exists()


def test_what_is_not_there_is_refused_in_one_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(capsys, here, "--tasks", "none.yaml") == "there is no task file none.yaml"
    assert refused(capsys, here, "--tasks", tmp_path / "none") == f"there is no task file {tmp_path / 'none'}"
    train(tiny("train.tokens=48"), tmp_path / "numbers")
    assert "no text: this needs a tokenizer" in refused(capsys, tmp_path / "numbers", "--needle")
    assert "is no run directory" in refused(capsys, tmp_path, "--needle")
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    assert "pip install 'tangram-lm[eval]'" in refused(capsys, here, "--tasks", TASKS)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "small.yaml").write_text(TASK)
    (folder / "words.txt").write_text("a folder may hold anything")
    return folder


@WITH_HARNESS
def test_tasks_that_are_shipped_are_scored_kept_and_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(
        capsys, here, "--tasks", TASKS / "python_next_line.yaml", "--tasks", TASKS / "python_finish.yaml", "--json"
    )
    assert code == 0, err
    scores = {score["task"]: score for score in json.loads(out)["tasks"]}
    assert {name: score["items"] for name, score in scores.items()} == {"python_next_line": 24, "python_finish": 14}
    assert {m["name"] for m in scores["python_next_line"]["metrics"]} == {"acc", "acc_norm"}
    assert json.loads((here / "evaluations/python_finish.json").read_text()) == scores["python_finish"]
    assert {score.task for score in read_run(here).scores} == set(scores)
    text = page(read_run(here)).replace("<wbr>", "")
    assert all(f"<td>{name}</td>" in text for name in scores)
    code, again, _ = command(capsys, here, "--tasks", TASKS, "--json")
    assert {s["task"]: s for s in json.loads(again)["tasks"]} == scores


@WITH_HARNESS
def test_a_task_that_cannot_be_read_is_refused_in_one_line(
    here: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = small / "small.yaml"
    assert command(capsys, here, "--tasks", small)[0] == 0
    (small / "twice.yaml").write_text(TASK)
    assert refused(capsys, here, "--tasks", small) == "the name small is taken: give each task another"
    (small / "twice.yaml").unlink()
    for content, why in (
        ("task: [small\n", "broken YAML"),
        ("- task\n", "Expected YAML dict"),
        ("task: needle\n" + TASK.replace("task: small\n", ""), "the name needle is taken"),
        ("words: 1\n", "no `task: NAME`"),
        (TASK.replace("data.jsonl", "none.jsonl"), "none.jsonl"),
        (TASK.replace("{{text}}", "{{text"), "unexpected end of template"),
        (TASK + "include: none.yaml\n", "none.yaml"),
    ):
        task.write_text(content)
        told = refused(capsys, here, "--tasks", task)
        assert why in told
        assert str(task) in told or "needle" in told
    task.unlink()
    assert "no .yaml file in it describes a task" in refused(capsys, here, "--tasks", small)
    task.write_text(TASK)
    (small / "data.jsonl").write_text('{"text": \n')
    assert str(task) in refused(capsys, here, "--tasks", task)


@WITH_HARNESS
def test_what_generation_does_not_have_is_refused(here: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asks = TASK.replace("multiple_choice", "generate_until").replace('doc_to_choice: ["a", "b"]\n', "")
    (small / "small.yaml").write_text(asks + "generation_kwargs: {until: x, num_beams: 4}\n")
    assert "num_beams" in refused(capsys, here, "--tasks", small)

"""`tangram tokenize` and what is trained on its output; completion of the shell."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import SMALL

from tangram.core.cli import main

WORDS = [f"the {i}th sentence says {i * i} and {i % 7} things. " * 3 for i in range(60)]
SETTINGS = (
    *SMALL,
    "model.vocab_size=280",
    "train.tokens=192",
    "train.evaluate_every=2",
    "observers={jsonl: {}}",
)
TEXT = "data={use: text, corpus: files, files: [words.jsonl], held_out_every: 4}"
TOKENS = "data={use: tokens, folder: tokens}"


def tangram(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    return int(exited.value.code or 0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tangram.core.cli._draw", lambda directory, files: None)  # nobody looks at the pictures
    Path("words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))


def losses(run: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "loss" in key or "bits" in key} for row in rows]


def test_a_run_on_the_tokens_of_a_text_is_the_run_on_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert tangram("tokenize", "v3-tiny", "tokens", *SETTINGS, TEXT) == 0, capsys.readouterr()
    assert "data={use: tokens, folder: tokens}" in capsys.readouterr().out
    assert tangram("train", "v3-tiny", *SETTINGS, TEXT, "--out", "a") == 0, capsys.readouterr()
    Path("words.jsonl").unlink()
    assert tangram("train", "v3-tiny", *SETTINGS, TOKENS, "--out", "b") == 0, capsys.readouterr()
    assert len(losses("a")) >= 4
    assert losses("a") == losses("b")


def test_mistakes_with_tokens_are_told_and_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert tangram("tokenize", "v3-tiny", "tokens", *SETTINGS) == 2
    assert "tokenize a preset whose data is text" in capsys.readouterr().err
    assert tangram("tokenize", "v3-tiny", ".", *SETTINGS, TEXT) == 2
    assert "is there already" in capsys.readouterr().err
    assert tangram("tokenize", "v3-tiny", "tokens", *SETTINGS, TEXT.replace("words", "no")) == 2
    assert "no.jsonl" in capsys.readouterr().err
    assert tangram("train", "v3-tiny", *SETTINGS, TOKENS) == 2
    err = capsys.readouterr().err
    assert "data" in err and "tokens holds no index.json" in err


def test_completion_installs_into_the_home_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tangram.core.cli", "--install-completion", "--shell", "bash"],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "SHELL": "/bin/bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scripts = [path for path in tmp_path.rglob("*") if path.is_file() and "tokenize" in path.read_text()]
    assert scripts, done.stdout

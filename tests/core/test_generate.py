"""`tangram generate` as a person and as a program uses it."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from served import alone, offer, run
from tiny import on_text

from tangram.core.cli import main
from tangram.core.continuation import Request
from tangram.core.interchange import export
from tangram.core.run import train
from tangram.core.sampling import Sampling

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Run a command in an empty folder; return its code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return command


def expected(prompt: str, tokens: int, **settings: float) -> str:
    """Return the continuation of a prompt by a decoder of its own."""
    ids = (offer().tokenizer.bos, *offer().tokenizer.encode(prompt))
    return alone(Request(prompt=ids, tokens=tokens, sampling=Sampling(**settings)))[0]


def test_a_text_is_shown_with_its_continuation(shell: Shell) -> None:
    code, out, err = shell("generate", str(run()), "café", "--tokens", "12")
    assert (code, out) == (0, f"café{expected('café', 12)}\n")
    assert "12 tokens in " in err
    assert shell("generate", str(run()), "café", "--tokens", "12", "--speculate")[1] == out


def test_a_text_comes_from_standard_input(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("3: ends"))
    assert shell("generate", str(run()), "--tokens", "5")[1] == f"3: ends{expected('3: ends', 5)}\n"


def test_a_run_has_its_tokenizer_with_it(shell: Shell, tmp_path: Path) -> None:
    """Without the text that it was trained on it goes on as before; another tokenizer or text is refused."""
    text, made = tmp_path / "text", tmp_path / "run"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"{number}: naïve café 世界 🙂 ends {number}.\n")
    data = f"data={{use: text, corpus: files, files: ['{text}/*.txt'], held_out_every: 5}}"
    train(on_text(data, "train.tokens=48", "train.sequence_length=12"), made)
    asked = ("generate", str(made), "naïve", "--tokens", "8")
    code, before, err = shell(*asked)
    assert code == 0, err
    (text / "3.txt").unlink()
    assert shell(*asked)[:2] == (0, before)
    kept = made / "tokenizer.json"
    description = json.loads(kept.read_text(encoding="utf-8"))
    description["model"]["merges"].pop()
    kept.write_text(json.dumps(description))
    code, out, err = shell(*asked)
    assert (code, out) == (2, "")
    assert f"{kept}: not the tokenizer that the run was trained with" in err
    kept.unlink()  # then it is that of the text, which is another one by now
    (text / "4.txt").write_text("ends ends ends, and nothing but ends\n" * 9)
    code, out, err = shell(*asked)
    assert (code, out) == (2, "")
    assert f"{made}: not the tokenizer that the run was trained with" in err


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_of_texts_of_different_lengths(shell: Shell, tmp_path: Path, suffix: str) -> None:
    texts, file = ["1", "20: naïve", "ends 7."], tmp_path / f"prompts{suffix}"
    lines = texts if suffix == ".txt" else [json.dumps({"prompt": text}) for text in texts]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ("--prompts", str(file), "--tokens", "6", "--temperature", "0.9", "--seed", "5", "--batch", "2")
    code, out, _ = shell("generate", str(run()), *flags, "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == texts
    assert [row["text"] for row in rows] == [expected(t, 6, temperature=0.9, seed=5 + i) for i, t in enumerate(texts)]
    for row in rows:
        assert row["reason"] == "length"
        assert row["tokens"] == 6
        assert 0 < row["seconds_to_first"] <= row["seconds"]
    _, shown, _ = shell("generate", str(run()), *flags)
    assert shown == "".join(f"--- {i}\n{row['prompt']}{row['text']}\n" for i, row in enumerate(rows, start=1))


def test_a_text_ends_before_a_stop_string(shell: Shell) -> None:
    whole = expected("1", 20)
    stop = whole[4:6]
    _, out, _ = shell("generate", str(run()), "1", "--tokens", "20", "--stop", stop, "--json")
    row = json.loads(out)
    assert (row["text"], row["reason"]) == (whole[: whole.index(stop)], "stop")


def test_speculation_is_told(shell: Shell) -> None:
    _, out, _ = shell("generate", str(run()), "1", "--tokens", "20", "--speculate", "--json")
    row = json.loads(out)
    assert row["text"] == expected("1", 20)
    assert len(row["acceptance"]) == 1
    assert 0 <= row["acceptance"][0] <= 1
    assert 1 <= row["tokens_per_round"] <= 2


def test_a_conversation_goes_through_the_template(shell: Shell) -> None:
    chat = offer().chat
    assert chat is not None
    ids = tuple(chat.prompt([{"role": "user", "content": "café"}]))
    _, out, _ = shell("generate", str(run()), "café", "--tokens", "5", "--chat", "--json")
    assert json.loads(out)["text"] == alone(Request(prompt=ids, tokens=5))[0]


def test_released_weights_are_continued_as_the_run_they_came_from(shell: Shell, tmp_path: Path) -> None:
    export(run(), tmp_path / "released")
    code, out, _ = shell("generate", str(tmp_path / "released"), "café", "--tokens", "4")
    assert code == 0
    # The run computes in float64 and what was released in float32.
    assert out.startswith("café")
    assert not list(tmp_path.glob("**/experiment.yaml"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "--temperature", "-1"], "'temperature' must be >= 0.0: -1.0"),
        (["x", "--top-p", "0"], "'top_p' must be > 0.0: 0.0"),
        (["x", "--tokens", "0"], "--tokens must be >= 1: 0"),
        (["x", "--batch", "0"], "--batch is at least 1"),
        (["x", "--stop", ""], "a stop string is not empty"),
        (["x", "--prompts", "there-is-none"], "give a text or --prompts FILE, not both"),
        (["--prompts", "there-is-none"], "there-is-none cannot be read: "),
    ],
)
def test_mistakes_are_named(shell: Shell, arguments: list[str], said: str) -> None:
    code, out, err = shell("generate", str(run()), *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_a_line_that_has_no_text_is_named(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    code, _, err = shell("generate", str(run()), "--prompts", str(file))
    assert (code, err) == (2, f'{file}:2: no object with a text: write {{"prompt": "..."}}\n')


def test_what_is_no_model_is_refused(shell: Shell, tmp_path: Path) -> None:
    code, _, err = shell("generate", str(tmp_path), "x")
    assert (code, err) == (2, f"{tmp_path} is no run directory: it has no experiment.yaml\n")
    (tmp_path / "config.json").write_text("{")
    code, _, err = shell("generate", str(tmp_path), "x")
    assert code == 2
    assert str(tmp_path) in err


def test_longer_than_it_was_trained_on_is_said(shell: Shell) -> None:
    code, _, err = shell("generate", str(run()), "x", "--tokens", "70")
    assert code == 0
    assert "the model was trained on 64 at a time" in err

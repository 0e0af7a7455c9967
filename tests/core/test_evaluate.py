"""`tangram evaluate`: the newest checkpoint, or its averaged weights, on all held-out text; the run stays as it is."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tiny import tiny

from tangram.core import load_run
from tangram.core.cli import main
from tangram.core.evaluation import evaluate
from tangram.core.pages import page
from tangram.core.reports import read_run
from tangram.core.run import train

SHORT = ("train.tokens=192", "model.vocab_size=300", "observers.ema.decay=0.5")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i} says {'this and that ' * (1 + i % 5)}\n" * 2)
    text = f"data={{use: text, corpus: files, files: ['{folder}/*.txt'], held_out_every: 4}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        train(tiny(text, *SHORT), folder / "run")
        yield folder / "run"


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exited:
        main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(exited.value.code or 0), out, err


def contents(directory: Path) -> dict[Path, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path: sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_repeats_the_last_row_of_the_run_and_writes_nothing(run, capsys):
    before = contents(run)
    code, out, err = command(capsys, run, "--json")
    assert code == 0, err
    found = json.loads(out)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found.pop("weights") == "last"
    assert found.pop("references").keys() == {"gzip -9", "xz -6"}
    assert found == last
    assert contents(run) == before


def test_the_averaged_weights_are_evaluated_in_place_of_the_last(run, capsys):
    before = contents(run)
    by_hand = load_run(run)
    averaged = load_run(run, averaged=True)
    with torch.no_grad():
        for parameter, value in zip(by_hand.model.parameters(), averaged.model.parameters(), strict=True):
            parameter.copy_(value)
    expected = evaluate(by_hand)
    found = json.loads(command(capsys, run, "--ema", "--json")[1])
    assert found["weights"] == "averaged"
    assert found["eval.bits_per_byte"] == expected.bits_per_byte
    assert found["eval.bits_per_byte"] != json.loads(command(capsys, run, "--json")[1])["eval.bits_per_byte"]
    assert contents(run) == before


def test_it_tells_bits_per_byte_beside_the_references(run, capsys):
    code, out, _ = command(capsys, run)
    assert code == 0
    assert "step 4, last weights" in out
    assert "bits per byte; the same text by gzip -9" in out
    assert "step 4, averaged weights" in command(capsys, run, "--ema")[1]


def test_what_cannot_be_evaluated_exits_with_2_and_says_why(tmp_path, capsys):
    train(tiny("train.tokens=48", "observers.ema=null"), tmp_path / "run")
    for arguments, text in (
        ((tmp_path / "run", "--ema"), "has no averaged weights: train with the observer ema (observers.ema={})"),
        ((tmp_path / "run",), "without held-out text"),
        ((tmp_path,), "is no run directory"),
    ):
        code, out, err = command(capsys, *arguments)
        assert code == 2
        assert text in err
        assert "Traceback" not in out + err


def test_the_run_ends_with_the_averaged_weights_evaluated_and_the_report_shows_both(run, capsys):
    last, averaged = (json.loads(command(capsys, run, *flags, "--json")[1]) for flags in ((), ("--ema",)))
    record = read_run(run)
    assert record.averaged["ema"]["eval.bits_per_byte"] == averaged["eval.bits_per_byte"]
    assert record.evaluations[-1]["eval.bits_per_byte"] == last["eval.bits_per_byte"]
    text = page(record)
    assert "averaged by ema" in text
    assert f"<td>{averaged['eval.bits_per_byte']:.3f}</td>" in text

"""The command `serve` as a user meets it before anything is served."""

import ast
import socket
from pathlib import Path

import pytest
from released import saved
from served import run

from tangram.core import cli_serve
from tangram.core.cli import main

ROOT = Path(__file__).parents[3]


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return what a command that is refused says."""
    with pytest.raises(SystemExit) as exited:
        main(["serve", *map(str, arguments), *([] if "--port" in arguments else ["--port", "0"])])
    out, err = capsys.readouterr()
    assert (exited.value.code, out) == (2, "")
    return err


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--batch", 0), "--batch is at least 1"),
        (("--queue", -1), "--queue is at least 0"),
        (("--context", 1), "--context is at least 2"),
        (("--body", 0), "--body is at least 1"),
        (("--seconds", 0), "--seconds is more than 0"),
        (("--seconds", "nan"), "--seconds is more than 0"),
        (("--port", 65536), "--port is from 0 to 65535"),
        (("--decode-workers", -1), "--decode-workers is at least 0"),
        (("--prefill-workers", 1), "say how many of these there are to be"),
        (("--host", "256.1.1.1"), "cannot listen on 256.1.1.1:0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(capsys, flags, why) -> None:
    said = told(capsys, run(), *flags)
    assert why in said and said.count("\n") == 1


def test_a_port_that_is_taken_is_refused(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in told(capsys, run(), "--port", taken.getsockname()[1])


def test_a_run_that_cannot_be_served_is_refused(capsys, tmp_path) -> None:
    assert "is no run directory" in told(capsys, tmp_path / "none")
    saved(tmp_path / "synthetic")
    assert "stand for no text" in told(capsys, tmp_path / "synthetic")
    saved(tmp_path / "plain", "objectives.mtp=null")
    files = str(next(iter(run().parent.glob("*.jsonl"))))
    saved(
        tmp_path / "text",
        "objectives.mtp=null",
        "model.vocab_size=280",
        f"data={{use: text, corpus: files, files: ['{files}']}}",
    )
    assert "no modules that draft" in told(capsys, tmp_path / "text", "--speculate")


def test_without_the_extra_the_command_says_how_to_get_it(capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli_serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert told(capsys, run()) == "serving needs uvicorn: pip install 'tangram-lm[serve]'\n"


def test_without_the_extra_every_module_is_imported_all_the_same() -> None:
    for path in (ROOT / "plugins" / "serving").glob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in body if isinstance(node, ast.ImportFrom)]
        for name in names:
            assert name.partition(".")[0] not in {"starlette", "uvicorn", "prometheus_client", "jinja2"}, path.name

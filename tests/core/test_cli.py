"""The command line as a user meets it: what it prints, its exit codes, and its errors."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from tiny import SMALL

from tangram.core.cli import main
from tangram.kernels import backend


class Shell:
    """Runs commands in this process, in a folder of their own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return int(exited.value.code or 0), out, err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


def test_list_shows_every_slot_and_preset(shell: Shell) -> None:
    code, out, _ = shell("list", "--json")
    listed = json.loads(out)
    assert code == 0
    assert {"attention", "router", "objective", "data"} < {row["slot"] for row in listed["components"]}
    assert all(row["summary"] and row["origin"] == "tangram" for row in listed["components"])
    assert set(listed["presets"]) >= {"deepseek-v3", "v3-tiny", "gqa-baseline"}
    assert listed["broken"] == []
    code, out, _ = shell("list", "attention")
    assert code == 0
    assert "mla" in out
    assert "aux_free" not in out


def test_describe_a_component_shows_every_field_with_its_meaning(shell: Shell) -> None:
    code, out, _ = shell("describe", "attention", "mla", "--json")
    fields = {field["name"]: field for field in json.loads(out)["fields"]}
    assert code == 0
    assert fields["n_heads"]["default"] == "required"
    assert fields["q_rank"] == {
        "name": "q_rank",
        "type": "int | null",
        "default": "null",
        "doc": "Width of the query latent; null makes queries directly.",
    }
    assert shell("describe", "attention", "mla")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["mla"], "'mla' is a component: tangram describe attention mla"),
        (["atention", "mla"], "there is no slot 'atention', did you mean 'attention'?"),
        (["attention"], "say which attention: gqa, mla"),
        (["attention", "mlaa"], "there is no attention 'mlaa', did you mean 'mla'?"),
        (["attention", "xyz"], "there is no attention 'xyz' (known: gqa, mla)"),
    ],
)
def test_describe_leads_to_the_component_that_was_meant(shell: Shell, arguments: list[str], answer: str) -> None:
    assert shell("describe", *arguments) == (2, "", answer + "\n")


def test_a_table_that_no_terminal_shows_has_a_line_for_each_row(shell: Shell) -> None:
    listed = json.loads(shell("list", "--json")[1])["components"]
    lines = shell("list")[1].splitlines()
    for row in listed:
        words = [row["slot"], row["use"], *row["summary"].split(), *row["paper"].split(), row["origin"]]
        assert any(line.split() == words for line in lines), row


def test_help_shows_what_stands_in_angle_brackets_and_no_option_that_undoes_nothing(shell: Shell) -> None:
    out = shell("train", "--help")[1]
    assert "runs/<name>-<hash>" in out
    assert "--no-resume" not in out
    assert shell("--version")[1].strip() == metadata.version("tangram-lm")


def test_describe_a_preset_counts_it(shell: Shell) -> None:
    code, out, _ = shell("describe", "deepseek-v3", "--json")
    described = json.loads(out)
    assert code == 0
    assert described["parameters"]["total"] == 671_026_419_200
    kept = described["activation_bytes"]
    # A block keeps the stream that enters it, what goes to the eight experts of a token and what comes from them.
    assert kept["full"] > 58 * (1 + 8 + 8) * 4096 * 7168 * 2
    # Selective makes queries and keys again: 128 heads of 192.
    assert kept["none"] - kept["selective"] > 61 * 2 * 4096 * 128 * 192 * 2
    code, out, _ = shell("describe", "v3-tiny", *SMALL)
    assert code == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if "." in line.partition(" ")[0])
    assert {"parameters.total", "activation_bytes.none", "activation_bytes.selective", "activation_bytes.full"} <= set(
        rows
    )


def test_describe_predicts_nothing_of_what_looks_at_values(shell: Shell) -> None:
    Path("peeking.py").write_text(
        "from attrs import frozen\n"
        "from tangram.core import component\n"
        "from tangram.plugins.moe.swiglu import SwiGLU, SwiGLUConfig\n\n"
        "class Peeking(SwiGLU):\n"
        "    def transform(self, x):\n"
        "        return super().transform(x / float(x.detach().abs().max()))\n\n"
        "@component('feedforward', use='peeking')\n"
        "@frozen(kw_only=True)\n"
        "class PeekingConfig(SwiGLUConfig):\n"
        '    """Divide by the largest."""\n\n'
        "    def build(self, ctx):\n"
        "        return Peeking(self, ctx)\n"
    )
    asked = ["describe", "v3-tiny", *SMALL, "model.blocks.0.feedforward={use: peeking, hidden: 4}"]
    code, out, _ = shell(*asked, "--plugin", "peeking.py")
    assert code == 0
    assert "activation_bytes: not predicted, for a forward without values fails: Tensor.item()" in out
    assert json.loads(shell(*asked, "--plugin", "peeking.py", "--json")[1])["activation_bytes"] is None


def test_show_prints_a_preset_that_resolves_to_itself(shell: Shell) -> None:
    code, out, _ = shell("show", "v3-tiny", "train.seed=7")
    assert code == 0
    Path("mine.yaml").write_text(out)
    assert shell("show", "./mine.yaml")[1] == out
    assert json.loads(shell("diff", "./mine.yaml", "v3-tiny", "--json")[1]) == {"train.seed": {"a": 7, "b": 0}}


def test_show_says_where_every_value_comes_from(shell: Shell) -> None:
    code, out, _ = shell("show", "v3-tiny", "train.seed=7", "--origin", "--json")
    origins = {path: entry["origin"] for path, entry in json.loads(out).items()}
    assert code == 0
    assert origins["train.seed"] == "train.seed=7"
    assert origins["optimizer.eps"] == "default"
    assert "presets/v3-tiny.yaml:" in origins["model.dim"]
    assert "presets/deepseek-v3.yaml:" in origins["model.block.attention.use"]


def test_copy_gives_a_preset_to_edit_and_overwrites_nothing(shell: Shell) -> None:
    assert shell("copy", "v3-tiny", "mine.yaml")[0] == 0
    assert shell("diff", "mine.yaml", "v3-tiny")[1].strip() == "no difference"
    first, schema = Path("mine.yaml").read_text().splitlines()[0].split("$schema=")
    assert first == "# yaml-language-server: "
    assert Path(schema).is_file()
    code, _, err = shell("copy", "v3-tiny", "mine.yaml")
    assert code == 2
    assert "mine.yaml is there already" in err
    assert shell("copy", "v3-tiny", "nowhere/mine.yaml")[0] == 2


def test_check_passes_what_can_be_built(shell: Shell) -> None:
    for preset in ("deepseek-v3", "gqa-baseline"):
        code, out, err = shell("check", preset, "data={use: synthetic}", "--json")
        assert code == 0, err
        assert json.loads(out)["ok"] is True


MISTAKES = [
    (["model.dimm=3"], "model.dimm", "did you mean 'dim'?"),
    (["model.dim=tree"], "model.dim", "expected"),
    (["model.dim=2.5"], "model.dim", "2.5"),
    (["model.dim=true"], "model.dim", "true"),
    (["model.dim=-4"], "model.dim", "-4"),
    (["train.lr=[{value: 1}, {value: 2}]"], "train.lr", "until"),
    (["model.block.attention.use=mlaa"], "model.block.attention", "did you mean 'mla'?"),
    (["model.block.feedforward.router.top_k=33"], "router", "top_k 33 is more than"),
    (["model.block.feedforward.router.n_groups=5"], "router", "n_groups 5 does not divide the 32 experts"),
    (["train.micro_sequences=0"], "train.micro_sequences", "0"),
    (["model.dim"], "'model.dim'", "dotted.path=value"),
    (["model.blocks.7.repeat=1"], "model.blocks.7", "there is no element 7"),
    (["data={use: text, corpus: files, files: ['no/such/*.txt']}"], "data", "no/such/*.txt"),
    (["data={use: text, corpus: files}"], "data", "files"),
    (["model.vocab_size=100"], "data", "100"),
    (
        ["parallel={pipeline: {use: gpipe}, pipeline_ranks: 7}", "data={use: synthetic}"],
        "parallel.pipeline_ranks",
        "6 layers do not make 7 stages",
    ),
]


@pytest.mark.parametrize(("overrides", "path", "text"), MISTAKES)
def test_a_mistake_is_named_with_its_path_and_exits_with_2(
    shell: Shell, overrides: list[str], path: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, err = shell("check", "v3-tiny", *overrides)
    assert code == 2
    assert path in err
    assert text in err
    assert "Traceback" not in out + err


def test_every_error_of_a_file_is_told_at_once_with_its_line(shell: Shell) -> None:
    Path("bad.yaml").write_text("extends: v3-tiny\nmodel:\n  dim: x\n  vocab: 3\ntrain: {lr: fast}\n")
    code, _, err = shell("train", "bad.yaml")
    assert code == 2
    lines = err.strip().splitlines()
    assert [line.split(": ")[0] for line in lines] == ["bad.yaml:3", "bad.yaml:4", "bad.yaml:5"]
    Path("torn.yaml").write_text("model: {dim: 3\n")
    code, _, err = shell("show", "torn.yaml")
    assert code == 2
    assert err.startswith("torn.yaml:")
    Path("big.yaml").write_text("extends: v3-tiny\nmodel:\n  block:\n    feedforward:\n      router: {top_k: 33}\n")
    code, _, err = shell("train", "big.yaml")
    assert code == 2
    assert err.startswith("big.yaml:5: ")


def test_what_is_not_there_exits_with_2(shell: Shell) -> None:
    for arguments in (
        ["show", "v3-tinny"],
        ["show", "missing.yaml"],
        ["trian", "v3-tiny"],
        ["train", "v3-tiny", "--resumee"],
        ["list", "attentoin"],
        ["describe", "attention", "mlaa"],
        ["show", "v3-tiny", "--plugin", "missing.py"],
        ["train"],
    ):
        code, out, err = shell(*arguments)
        assert code == 2, arguments
        assert out + err
        assert "Traceback" not in out + err


def test_a_named_plugin_that_does_not_load_exits_with_3_and_its_error(shell: Shell) -> None:
    Path("broken.py").write_text("import no_such_module\n")
    code, _, err = shell("train", "v3-tiny", "--plugin", "broken.py")
    assert code == 3
    assert "broken.py" in err
    assert "No module named 'no_such_module'" in err
    Path("mine.yaml").write_text("extends: v3-tiny\nplugins: [broken.py]\n")
    code, _, err = shell("check", "mine.yaml")
    assert code == 3
    assert "no_such_module" in err


def test_a_plugin_file_fills_a_slot(shell: Shell) -> None:
    Path("uniform.py").write_text(
        "from attrs import frozen\n"
        "from tangram.core import component\n"
        "from tangram.plugins.moe.balancers import NoneConfig\n\n"
        "@component('balancer', use='mine')\n"
        "@frozen(kw_only=True)\n"
        "class Mine(NoneConfig):\n"
        '    """Do as none does."""\n'
    )
    code, out, _ = shell("describe", "balancer", "mine", "--plugin", "uniform.py")
    assert code == 0
    assert "Do as none does." in out
    override = "model.block.feedforward.balancer={use: mine}"
    assert shell("check", "deepseek-v3", override, "--plugin", "uniform.py")[0] == 0
    assert shell("check", "deepseek-v3", override)[0] == 2


TRAIN = ["train", "v3-tiny", *SMALL, "train.tokens=240", "--out", "run"]


def test_train_runs_resumes_and_refuses_to_overwrite(shell: Shell) -> None:
    code, out, err = shell(*TRAIN)
    assert code == 0, err
    assert "objectives.mtp: too short to tell" in out
    assert "everything is in run" in out
    code, _, err = shell(*TRAIN)
    assert code == 2
    assert "--resume" in err
    assert shell(*TRAIN, "--resume")[0] == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_a_dead_piece_fails_the_run_and_is_named(shell: Shell) -> None:
    arguments = [a for a in TRAIN if not a.startswith("train.tokens")]
    small = ("model.blocks.1.repeat=1", "objectives.mtp=null", "train.batch_sequences=2", "train.micro_sequences=2")
    dead = "objectives.sequence_balance.weight=0.0"
    code, _, err = shell(*arguments, *small, "train.tokens=2424", "train.lr=0.003", dead)
    assert code == 1
    assert err.strip() == "objectives.sequence_balance had no effect: its weight was 0 all along"


def test_a_loss_that_is_not_finite_fails_the_run_and_names_it(shell: Shell) -> None:
    code, _, err = shell(*TRAIN, "guard={use: raise}", "train.lr=1.0e+30")
    assert code == 1
    assert re.match(r"stopped before the update of step \d: (loss|the gradient)", err)
    assert "Traceback" not in err


def test_doctor_says_what_is_here(shell: Shell) -> None:
    code, out, _ = shell("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["torch"].startswith("2.")
    assert found["broken plugins"] == []


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Return what sets TANGRAM_KERNELS, which a process reads once."""
    yield monkeypatch
    monkeypatch.undo()
    backend._by_environment.cache_clear()


def test_doctor_says_which_path_operations_take_and_why(shell: Shell, environment: pytest.MonkeyPatch) -> None:
    def said() -> tuple[str, str]:
        backend._by_environment.cache_clear()
        code, out, _ = shell("doctor", "--json")
        assert code == 0
        found = json.loads(out)
        return found["operations on a CPU"], found["operations on a GPU"]

    environment.delenv("TANGRAM_KERNELS", raising=False)
    assert said()[0] == "plain torch (auto by the default)"
    assert said()[1].startswith("the Triton kernel")
    environment.setenv("TANGRAM_KERNELS", "reference")
    assert set(said()) == {"plain torch (reference by TANGRAM_KERNELS)"}


def test_a_path_that_is_none_is_a_mistake_of_the_user(shell: Shell, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TANGRAM_KERNELS", "tritn")
    for command in (["doctor"], TRAIN):
        backend._by_environment.cache_clear()
        code, _, err = shell(*command)
        assert (code, err.splitlines()[-1]) == (2, "TANGRAM_KERNELS is 'tritn'; it is auto, reference or triton")


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tangram.core.cli", "list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_component_names_its_paper(shell: Shell) -> None:
    papers = {(row["slot"], row["use"]): row["paper"] for row in json.loads(shell("list", "--json")[1])["components"]}
    assert papers["attention", "mla"] == "arXiv:2412.19437, section 2.1.1, equations 1 to 11"
    assert papers["balancer", "aux_free"] == "arXiv:2408.15664"
    assert papers["observer", "jsonl"] == ""
    assert "section 2.1.1" in shell("describe", "attention", "mla")[1]


def test_help_and_usage_errors_import_no_torch() -> None:
    for arguments in (["--help"], ["train", "--help"], ["trian"]):
        code = (
            "import sys\nfrom tangram.core.cli import main\n"
            f"try: main({arguments!r})\nexcept SystemExit: pass\n"
            "assert not {'torch', 'markdown_it'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_schedule_is_simulated_drawn_and_written(shell: Shell, tmp_path: Path) -> None:
    asked = ("schedule", "dualpipe", "--ranks", 4, "--microbatches", 8)
    code, out, _ = shell(*asked, "--costs", "F=1,I=1,W=1,FB=3", "--json", "--svg", tmp_path / "chart.svg")
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"makespan", "bubble", "peak", "formula", "program"}
    assert (found["makespan"], found["bubble"], found["peak"], found["formula"]) == (26.0, [2.0] * 4, [5] * 4, 2.0)
    assert found["program"][0][:5] == ["F>0", "F>1", "F>2", "F<0", "I<0"]
    assert (tmp_path / "chart.svg").read_text().startswith("<svg")
    code, out, _ = shell(*asked)
    assert code == 0
    assert "longest bubble 2; the closed form says 2" in out
    code, out, _ = shell(*asked, "--costs", "F=1,I=2", "--json")
    assert json.loads(out)["formula"] is None
    code, out, _ = shell("schedule", "interleaved", "rounds=3", "--ranks", 2, "--microbatches", 4, "--json")
    assert code == 0
    assert json.loads(out)["program"][0][:3] == ["F>0@0", "F>1@0", "F>0@2"]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["dualpip"], "there is no pipeline 'dualpip', did you mean 'dualpipe'?"),
        (["dualpipe", "--microbatches", 7], "needs an even number of micro-batches, at least 8: not 7"),
        (["gpipe", "--costs", "G=1"], "--costs knows F, I, W, FB, latency, not 'G'"),
        (["gpipe", "--costs", "F=x"], "--costs: F is 'x'; it is a number"),
        (["gpipe", "--costs", "F=-1"], "--costs:"),
        (["interleaved", "ronds=3"], "ronds: unknown key, did you mean 'rounds'?"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_a_line(shell: Shell, arguments: list[object], answer: str) -> None:
    given = arguments if "--microbatches" in arguments else [*arguments, "--microbatches", 8]
    code, _, err = shell("schedule", *given, "--ranks", 4)
    assert code == 2
    assert answer in err
    assert len(err.strip().splitlines()) == 1

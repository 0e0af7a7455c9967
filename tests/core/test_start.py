"""A run starts from another one's weights and expert biases, in whatever layout, and from nothing else of it."""

import json
import shutil
from pathlib import Path

import pytest
import start_at_work
import torch
from tiny import on_text, tiny

from tangram.core import checkpoint, load_run
from tangram.core.assembly import assemble
from tangram.core.cli import main
from tangram.core.context import BuildError
from tangram.core.experiment import Experiment
from tangram.core.pages import page
from tangram.core.presets import to_yaml
from tangram.core.records import Progress
from tangram.core.reports import read_run
from tangram.core.run import train
from tangram.core.start import source, start_from
from tangram.core.trained import load_offer
from tangram.testing import run_ranks

FEW = ("train.tokens=192", "train.evaluate_every=2", "train.evaluate_sequences=1000", "train.lr=0.05")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of four steps, whose biases have moved."""
    directory = tmp_path_factory.mktemp("start") / "earlier"
    train(on_text(*FEW), directory)
    return directory


def later(earlier: Path, *overrides: str) -> Experiment:
    return on_text(*FEW, f"train.init_from={earlier}", *overrides)


def rows(directory: Path) -> list[dict[str, object]]:
    clock = ("seconds", "tokens_per_second")
    lines = (json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in clock} for row in lines]


def test_it_has_their_values_and_begins_at_its_own_first_step(earlier: Path) -> None:
    run, expected = assemble(later(earlier)), load_run(earlier).model.state_dict()
    drawn = {key: tensor.clone() for key, tensor in run.model.state_dict().items()}
    start_from(run, source(earlier))
    held = run.model.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[key], expected[key]) for key in expected)
    assert any(key.endswith("biases") and not torch.equal(held[key], drawn[key]) for key in expected)
    assert run.progress == Progress()
    assert not run.optimizer.state


def test_its_tokenizer_and_chat_template_come_with_it(earlier: Path, tmp_path: Path) -> None:
    there = Path(shutil.copytree(earlier, tmp_path / "earlier"))
    (there / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    train(later(there), tmp_path / "run")
    offer = load_offer(tmp_path / "run", (), speculate=False)
    assert offer.chat is not None
    asked = offer.chat.prompt([{"role": "user", "content": "ends"}])
    assert offer.tokenizer.decode(asked) == "ends!"
    for path in (there, tmp_path / "run"):
        assert (path / "tokenizer.json").read_text() == (earlier / "tokenizer.json").read_text()


def test_its_losses_need_not_fall(earlier: Path, tmp_path: Path) -> None:
    train(later(earlier, "train.tokens=48"), tmp_path / "run")
    for run, trained in ((earlier, False), (tmp_path / "run", True)):
        state = checkpoint.read_state(source(run).path)
        assert state["liveness"]["trained"] is trained


def test_before_its_first_step_it_is_worth_what_the_other_was_at_its_end(earlier: Path, tmp_path: Path) -> None:
    train(later(earlier), tmp_path / "run")
    first, *rest = rows(tmp_path / "run")
    last = rows(earlier)[-1]
    assert first["step"] == 0
    assert {k: v for k, v in first.items() if k.startswith("eval.")} == {
        k: v for k, v in last.items() if k.startswith("eval.")
    }
    assert rest[-1]["eval.loss.next_token"] != first["eval.loss.next_token"]
    about = json.loads((tmp_path / "run/about.json").read_text())
    assert about["start"]["checkpoint"] == str(earlier / "checkpoints/step-4")
    assert f"<td>{earlier / 'checkpoints/step-4'}</td>" in page(read_run(tmp_path / "run"))


@pytest.mark.parametrize("guard", ["raise", "rollback"])
def test_begun_again_or_resumed_its_metrics_are_those_of_a_run_that_was_left_alone(
    earlier: Path, tmp_path: Path, guard: str
) -> None:
    """Before its first checkpoint it begins again; with the guard that goes back there is one before its first step."""
    experiment = later(earlier, f"guard={{use: {guard}}}", "train.keep_every=1")
    train(experiment, tmp_path / "run")
    undisturbed = rows(tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("step-*"):
        if path.name != "step-0":
            shutil.rmtree(path)
    train(experiment, tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == undisturbed
    assert [row["step"] for row in undisturbed if "eval.complete" in row] == [0, 2, 4, 4]


def test_once_it_has_a_checkpoint_the_other_run_may_go(earlier: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier, tmp_path / "earlier")
    experiment = later(tmp_path / "earlier", "train.checkpoint_every=2")
    train(experiment, tmp_path / "run")
    undisturbed = rows(tmp_path / "run")
    shutil.rmtree(tmp_path / "earlier")
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    train(experiment, tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(
    "layout",
    [
        "{pipeline: {use: one_f_one_b}, pipeline_ranks: 2}",
        "{pipeline: {use: sequential}, expert_ranks: 2, sharding: {use: fsdp}}",
    ],
    ids=["stages", "experts and rows"],
)
def test_ranks_take_what_they_hold(earlier: Path, tmp_path: Path, layout: str) -> None:
    dispatcher = "model.block.feedforward.dispatcher={use: all_to_all}" if "expert" in layout else "name=stages"
    (tmp_path / "later.yaml").write_text(to_yaml(later(earlier, f"parallel={layout}", dispatcher)))
    found = run_ranks(start_at_work.started, 2, 2, tmp_path / "later.yaml", earlier)
    expected, seen = load_run(earlier).model.state_dict(), set()
    for start, held, shares in found:
        assert (start.drawn, start.left) == ((), ())
        for address, tensor in held.items():
            rows = shares.get(address, range(len(expected[address])))
            assert torch.equal(tensor, expected[address][rows.start : rows.stop]), address
        seen |= held.keys()
    assert seen == expected.keys()
    assert any(len(held) < len(expected) or shares for _, held, shares in found)


def test_an_objective_may_be_gone_or_new_and_that_is_said(earlier: Path, tmp_path: Path) -> None:
    without = later(earlier, "objectives.mtp=null")
    with pytest.warns(UserWarning, match=r"objectives\.mtp is left behind"):
        train(without, tmp_path / "without")
    model = load_run(tmp_path / "without").model
    assert not any(address.startswith("objectives.") for address in model.state_dict())
    with pytest.warns(UserWarning, match=r"objectives\.mtp is not there: it begins with drawn weights"):
        train(later(tmp_path / "without"), tmp_path / "with")
    assert json.loads((tmp_path / "with/about.json").read_text())["start"]["drawn"] == ["mtp"]


def test_a_module_of_an_objective_that_is_there_has_to_fit(earlier: Path) -> None:
    run = assemble(later(earlier, "objectives.mtp.depth=2"))
    with pytest.raises(BuildError, match=r"objectives\.mtp\.depths\.1\..* is missing"):
        start_from(run, source(earlier))


def refused(capsys: pytest.CaptureFixture[str], preset: Path, out: Path) -> str:
    """Return what the command says of a run that cannot start; nothing is left of it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exited:
        main(["train", str(preset), "--out", str(out)])
    said = capsys.readouterr().err
    assert exited.value.code == 2, said
    assert "Traceback" not in said
    assert not out.exists()
    return said


def test_what_cannot_be_started_from_is_refused_where_it_is_written(
    earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, out = tmp_path / "mine.yaml", tmp_path / "out"

    def told(experiment: Experiment) -> str:
        preset.write_text(to_yaml(experiment))
        line = next(n for n, text in enumerate(preset.read_text().splitlines(), 1) if "init_from" in text)
        said = refused(capsys, preset, out)
        assert f"mine.yaml:{line}: train.init_from: " in said
        return said

    assert "is no run directory: say which run's weights to start from" in told(later(tmp_path / "none"))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(earlier / "experiment.yaml", bare)
    assert "has no checkpoint yet" in told(later(bare))
    broken = shutil.copytree(earlier, tmp_path / "broken")
    for path in broken.glob("checkpoints/step-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert "no checkpoint is whole" in told(later(broken))
    assert "another tokenizer" in told(later(earlier, "model.vocab_size=270"))
    assert "another tokenizer" in told(later(earlier, "data={use: synthetic}"))
    wider = told(later(earlier, "model.block.attention.kv_rank=9"))
    assert "does not fit the experiment: blocks.0.attention.kv_down.weight has shape" in wider
    assert "is missing" in told(later(earlier, "model.blocks.1.repeat=2"))


def test_check_says_that_there_is_no_such_run_yet(earlier: Path, tmp_path: Path) -> None:
    from tangram.core.assembly import rehearse

    assert rehearse(later(earlier)).remarks == ()
    assert rehearse(tiny(f"train.init_from={tmp_path / 'none'}")).remarks == (
        f"train.init_from: there is no run {tmp_path / 'none'} yet",
    )

"""A run on several processes: one dies and all go on; asked to stop, all save; another layout goes on from there."""

import json
from pathlib import Path

import pytest
from whole_runs import essence, trained, write_preset

STEPS, EVERY = 10, 4
RANKS = ("--nproc", "2")


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data ranks that share out the experts, with half of the optimizer's states each."""
    return write_preset(
        tmp_path_factory.mktemp("preset") / "short.yaml",
        f"train.tokens={STEPS * 48}",
        f"train.checkpoint_every={EVERY}",
        "model.block.feedforward.dispatcher={use: all_to_all}",
        "parallel={expert_ranks: 2, sharding: {use: zero1}}",
    )


@pytest.fixture(scope="module")
def whole(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, said = trained(preset, out, *RANKS)
    assert code == 0, said
    assert said.count(f"everything is in {out}") == 1, "one rank speaks"
    return out


def test_a_process_that_is_killed_takes_no_step_from_the_run(preset: Path, whole: Path, tmp_path: Path) -> None:
    code, said = trained(preset, tmp_path / "run", *RANKS, ends=f"once:{EVERY + 2}")
    assert code == 0, said
    assert f"step-{EVERY}, the newest checkpoint that is whole" in said
    assert essence(tmp_path / "run", STEPS) == essence(whole, STEPS)


def test_asked_to_stop_all_save_and_another_layout_goes_on(preset: Path, whole: Path, tmp_path: Path) -> None:
    code, said = trained(preset, tmp_path / "run", *RANKS, ends=f"agent:{EVERY + 2}")
    assert code == 75, said
    assert "forcefully" not in said, "no process waits until the agent kills it"
    newest = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").iterdir())
    assert EVERY + 2 <= newest < STEPS
    code, said = trained(preset, tmp_path / "run", "--resume", "parallel={expert_ranks: 1, sharding: {use: replicate}}")
    assert code == 0, said
    together, alone = (losses(run) for run in (whole, tmp_path / "run"))
    assert alone[:newest] == together[:newest]
    assert alone == pytest.approx(together, rel=1e-5)


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("fault", ["train.init_from=nowhere", "data={use: text, corpus: files, files: [none]}"])
def test_what_the_first_rank_alone_or_each_finds_wrong_is_said_once(preset: Path, tmp_path: Path, fault: str) -> None:
    """And no rank waits for another that has ended, or is started again to find the same."""
    code, said = trained(preset, tmp_path / "run", *RANKS, fault)
    assert code == 2, said
    assert f"{fault.partition('=')[0]}: " in said
    assert len(said.splitlines()) == 1, said

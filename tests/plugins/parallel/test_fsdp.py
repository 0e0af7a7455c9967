"""Parameters shared out by their rows: how much a rank holds, who may step them, and checkpoints in any layout.

That its steps are those of one rank is in test_laws.py and test_processes.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import rows_at_work
import torch
from safetensors.torch import load_file
from tiny import SMALL, exact
from torch import nn
from whole_runs import write_preset

from tangram.core import checkpoint, load_run
from tangram.core.assembly import rehearse
from tangram.core.block import Block
from tangram.core.checkpoint import Found
from tangram.core.cli import main
from tangram.core.context import BuildError
from tangram.core.interchange import export
from tangram.core.model import build_model
from tangram.testing import run_ranks

FSDP, ZERO1, REPLICATE = (f"parallel.sharding={{use: {use}}}" for use in ("fsdp", "zero1", "replicate"))
STEPS, EVERY = 4, 2
BITS = "eval.bits_per_byte"

UNEVEN = "model.block.attention.q_rank=5"
"""Of some parameters two of four ranks have two rows, one has one, and the last none."""


def padded(module: nn.Module, ranks: int) -> int:
    """Return the bytes of a module's parameters with rows for every rank alike."""
    return sum(-(-len(p) // ranks) * ranks * p[0].nbytes for p in module.parameters())


def test_between_steps_a_rank_has_its_rows_and_in_one_a_block_besides() -> None:
    ranks, overrides = 4, ("train.batch_sequences=4", "model.recompute=full", UNEVEN)
    model = build_model(exact(*overrides))
    block = max(padded(each, ranks) for each in model.modules() if isinstance(each, Block))
    for found in run_ranks(rows_at_work.memory, ranks, ranks, (*overrides, FSDP)):
        assert found.foreign == (), "read of its module, a parameter is that of the whole model"
        assert set(found.between) == {padded(model, ranks) // ranks}
        assert found.between[0] < found.most <= found.between[0] + block
        assert max(found.gradients) <= found.between[0]
        assert found.most_gradients <= found.between[0] + block


def refusal(*overrides: str, ranks: int) -> str:
    with pytest.raises(BuildError) as refused:
        rehearse(exact(FSDP, "optimizer={use: muon}", *overrides), ranks)
    return str(refused.value)


def test_muon_is_refused_where_matrices_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(ranks=2).startswith("optimizer: muon orthogonalises whole matrices")
    assert "zero1" in refusal(ranks=2)
    rehearse(exact(FSDP, "optimizer={use: muon}"), 1)
    rehearse(exact(ZERO1, "optimizer={use: muon}"), 2)
    with pytest.raises(SystemExit) as exited:
        main(["check", "v3-tiny", *SMALL, FSDP, "optimizer={use: muon}", "--ranks", "2"])
    assert exited.value.code == 2
    assert "name zero1 there" in capsys.readouterr().err


def test_a_layout_is_tried_without_processes_and_counts_what_a_rank_keeps() -> None:
    one, four = (rehearse(exact(FSDP), ranks) for ranks in (1, 4))
    assert four.most * 4 == padded(build_model(exact(), device="meta"), 4) // torch.float64.itemsize
    assert one.most > 3.9 * four.most


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i} says {'this and that ' * (1 + i % 5)}\n" * 2)
    return write_preset(
        folder / "short.yaml",
        f"data={{use: text, corpus: files, files: ['{folder}/*.txt'], held_out_every: 4}}",
        "model.vocab_size=300",
        UNEVEN,
        "observers={fate: null, ema: {decay: 0.5}}",
        f"train={{tokens: {STEPS * 48}, checkpoint_every: {EVERY}, keep_last: {STEPS}}}",
        FSDP,
    )


@pytest.fixture(scope="module")
def run(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "four"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(preset.parent / "cache"))
        run_ranks(rows_at_work.trained, 4, 4, preset, out, (), None)
        yield out


def stopped(run: Path, folder: Path) -> tuple[Path, Found]:
    """Return a copy of a run as it was after its first checkpoint."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / f"checkpoints/step-{STEPS}")
    return folder, checkpoint.newest(folder / "checkpoints")


def losses(run: Path) -> list[float]:
    """Return the losses of all steps, of the evaluation, and of that of the averaged weights."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    averaged = json.loads((run / "verdict.json").read_text())["averaged"]["ema"]
    return [row[key] for key in ("loss", BITS) for row in [*rows, averaged] if key in row]


def test_another_layout_goes_on_from_rows(preset: Path, run: Path, tmp_path: Path) -> None:
    two = [(preset, *stopped(run, tmp_path / use), sharding) for use, sharding in (("fsdp", FSDP), ("zero1", ZERO1))]
    run_ranks(rows_at_work.several_trained, 2, 2, [(p, out, (cut,), found) for p, out, found, cut in two])
    out, found = stopped(run, tmp_path / "alone")
    rows_at_work.trained(0, 1, preset, out, (REPLICATE,), found)
    for name in ("fsdp", "zero1", "alone"):
        # Sums in another order, in float32; AdamW divides a gradient by its size, and so its rounding.
        assert losses(tmp_path / name) == pytest.approx(losses(run), rel=1e-5), name


def test_what_rows_are_exported_to_is_what_one_rank_would_write(run: Path, tmp_path: Path) -> None:
    out, found = stopped(run, tmp_path / "rows")
    assert len(list(found.path.glob("model.part-*.safetensors"))) == 4
    shutil.copytree(out, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole/checkpoints")
    files = {"model": load_run(out).model.state_dict()}
    checkpoint.save(tmp_path / "whole/checkpoints", EVERY, files, checkpoint.read_state(found.path))
    for name in ("rows", "whole"):
        export(tmp_path / name, tmp_path / f"{name}-exported")
    exported = [load_file(tmp_path / f"{name}-exported/model.safetensors") for name in ("rows", "whole")]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(exported[0][name], tensor) for name, tensor in exported[1].items())

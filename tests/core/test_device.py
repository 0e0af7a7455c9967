"""A run on an accelerator is the run on a CPU; nothing mixes the two."""

from collections.abc import Mapping
from pathlib import Path

import accelerator
import pytest
import torch
from tiny import exact, on_text, tiny

from tangram.core import build_model
from tangram.core.assembly import Seat, assemble
from tangram.core.checkpoint import Found
from tangram.core.decoding import Decoder, step_together
from tangram.core.experiment import Experiment
from tangram.core.model import Model
from tangram.core.records import Batch, one_document
from tangram.core.run import train
from tangram.core.sampling import Sampling
from tangram.core.session import Outcome
from tangram.core.step import train_step

DEVICES = ("cpu", accelerator.DEVICE)


def written(*overrides: str) -> Experiment:
    """Return an experiment on text, whose run evaluates and tries its drafts."""
    return on_text(
        "train={sequence_length: 16, micro_sequences: 4, tokens: 128, checkpoint_every: 1}",
        "observers.ema.decay=0.5",
        *overrides,
        held_out_every=12,
    )


def weights(model: Model) -> Mapping[str, torch.Tensor]:
    return {address: tensor.cpu() for address, tensor in model.state_dict().items()}


def run_at(device: str, directory: Path, resume: Found | bool = False) -> Outcome:
    """Return what becomes of a run at a device."""
    return train(written(), directory, resume=resume, seat=Seat(device=torch.device(device)))


@accelerator.apart
def test_it_begins_with_the_same_weights_bit_for_bit() -> None:
    here, there = (build_model(tiny(), 3, device) for device in DEVICES)
    assert all(str(tensor.device) == accelerator.DEVICE for tensor in there.state_dict().values())
    for address, tensor in weights(here).items():
        assert torch.equal(tensor, weights(there)[address]), address


@accelerator.apart
def test_a_run_ends_as_on_a_cpu_and_goes_on_from_what_either_saved(tmp_path: Path) -> None:
    directories = {device: tmp_path / device.partition(":")[0] for device in DEVICES}
    here, there = (run_at(device, directory) for device, directory in directories.items())
    assert here.evaluation is not None
    assert there.evaluation is not None
    assert there.evaluation.losses == pytest.approx(here.evaluation.losses, rel=1e-12)
    assert there.averaged["ema"].losses == pytest.approx(here.averaged["ema"].losses, rel=1e-12)
    assert there.speculation == here.speculation
    assert there.dead == here.dead == ()
    for device, directory in zip(DEVICES, reversed(directories.values()), strict=True):
        resumed = run_at(device, directory, Found(directory / "checkpoints" / "step-1", 1))
        assert resumed.evaluation is not None
        assert resumed.evaluation.now == here.evaluation.now
        assert resumed.evaluation.losses == pytest.approx(here.evaluation.losses, rel=1e-12)


FP8 = "precision={use: fp8, compute: float32}"
FLOAT64 = "precision.compute=float64"
MUON = "optimizer={use: muon}"
MOMENTS = "optimizer={use: adamw, moments: bfloat16}"
GQA = "model.block.attention={use: gqa, n_heads: 2, n_kv_heads: 1, head_dim: 8}"


@pytest.mark.parametrize(
    ("overrides", "bound"),
    [
        ((FP8,), 1e-5),
        ((FLOAT64, MUON, "model.recompute=full"), 1e-12),
        ((FLOAT64, MOMENTS, "model.recompute=selective"), 1e-12),
        ((FLOAT64, GQA), 1e-12),
    ],
    ids=["fp8", "muon", "moments", "gqa"],
)
@accelerator.apart
def test_steps_of_other_pieces_are_those_of_a_cpu(overrides: tuple[str, ...], bound: float) -> None:
    losses = []
    for device in DEVICES:
        run = assemble(tiny(*overrides, "train.batch_sequences=2"), Seat(device=torch.device(device)))
        steps = [train_step(run, run.data.batch(run.progress, 2)) for _ in range(2)]
        losses.append([step.result.total for step in steps])
    assert losses[1] == pytest.approx(losses[0], rel=bound)


@pytest.mark.parametrize("speculate", [False, True])
@accelerator.apart
def test_decoders_side_by_side_say_what_they_say_on_a_cpu(speculate: bool) -> None:
    prompts = [[[1, 2, 3], [4, 5]], [[6, 7, 8, 9]]]
    said = []
    for device in DEVICES:
        model = build_model(exact(), 3, device)
        decoders = [Decoder(model, 16, speculate=speculate) for _ in prompts]
        with accelerator.timeline() as done:
            for decoder, some in zip(decoders, prompts, strict=True):
                decoder.admit(some, [Sampling(temperature=0.7, seed=len(prompt)) for prompt in some])
            for _ in range(4):
                step_together(*decoders)
            decoders[1].take(decoders[0].release(0))
            step_together(*decoders)
        assert done.faults == []
        said.append([one.tokens for decoder in decoders for one in decoder.running])
    assert said[0] == said[1]


@accelerator.apart
def test_attention_asks_a_device_nothing_of_rows_that_are_one_document() -> None:
    model = build_model(tiny(), 3, accelerator.DEVICE)
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    batch = Batch(tokens, None, tokens, one_document(tokens), 24, 2).to(torch.device(accelerator.DEVICE))
    x = torch.randn(2, 12, 16).to(accelerator.DEVICE).requires_grad_()
    with accelerator.timeline() as done:
        model.blocks["0"].attention(x, batch.positions, batch.segments).sum().backward()
    assert done.waits == []
    model.blocks["0"].attention(x, batch.positions, batch.positions)
    assert done.waits, "documents that are not known are asked for"


def test_one_process_works_several_stages_to_the_end_of_a_run(tmp_path: Path) -> None:
    two = "parallel={pipeline: {use: dualpipev}}"
    outcome = train(written(two, "train.tokens=64", "train.micro_sequences=1", "train.prompt=de"), tmp_path / "run")
    assert outcome.sample.startswith("de")
    assert outcome.speculation

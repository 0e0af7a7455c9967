"""What a forward keeps: counted as it is, and predicted to the byte from a forward without memory."""

import pytest
import torch
from attrs import evolve
from tiny import tiny, trainer
from torch import Tensor

from tangram.core.activations import Made, UnpredictableError, kept_bytes, predict
from tangram.core.experiment import RECOMPUTE, Experiment
from tangram.core.model import build_model
from tangram.core.records import Batch, Progress
from tangram.testing.samples import packed


def test_what_is_alive_is_what_was_made_and_is_still_held() -> None:
    weight = torch.ones(4, 4)
    with Made() as made:
        assert made.alive() == 0
        weight.t().add_(1)  # a view, and a write in place: nothing new
        assert made.alive() == 0
        kept = torch.zeros(8)
        halves = kept.split(4)
        gone = kept + 1
        assert made.alive() == 2 * 8 * 4
        del gone
        assert made.alive() == 8 * 4
        del kept
        assert made.alive() == 8 * 4, "a view holds all of its storage"
        del halves
    assert made.alive() == 0


def counted(experiment: Experiment, recompute: str) -> int:
    """Return what a forward on values keeps, every sequence one document."""
    model = build_model(evolve(experiment, model=evolve(experiment.model, recompute=recompute)))
    train = experiment.train
    segments = [[0] * train.sequence_length] * train.micro_sequences
    return kept_bytes(model, packed(segments, experiment.model.vocab_size, seed=1))


@pytest.mark.parametrize(
    "overrides",
    [
        ("precision.compute=float32", "model.blocks.1.repeat=4", "objectives.mtp.depth=2"),
        ("precision.compute=bfloat16", "model.block.attention.q_rank=null"),
        ("precision.compute=float64", "train.sequence_length=1040", "train.micro_sequences=2"),
        ("precision={use: fp8, attention_cache: e5m6}", "train.sequence_length=70"),
        (
            "precision={use: fp8, accumulation: limited, compute: float32}",
            "model.block.attention={use: gqa, n_heads: 2, head_dim: 6}",
            "objectives.sequence_balance=null",
        ),
        ("model.block.feedforward={use: swiglu, hidden: 8}", "objectives.mtp=null", "objectives.sequence_balance=null"),
    ],
    ids=["deeper", "bfloat16", "longer than blocks", "fp8", "fp8 in short sums, gqa", "dense"],
)
def test_the_prediction_is_what_a_forward_keeps(overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the forward that is counted runs on a CPU
    experiment = tiny(*overrides)
    predicted = predict(experiment)
    assert predicted == {recompute: counted(experiment, recompute) for recompute in RECOMPUTE}
    assert predicted["none"] > predicted["selective"] > predicted["full"]


def test_it_is_what_autograd_was_told_to_save_and_hardly_more() -> None:
    run = trainer(tiny("train.sequence_length=64", "model.recompute=none"))
    batch = run.data.batch(run.progress, 1)
    given = {t.untyped_storage().data_ptr() for t in [*run.model.state_dict().values(), batch.tokens, batch.segments]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        carry = run.model(batch, Progress())
    kept = kept_bytes(run.model, batch)
    assert sum(saved.values()) <= kept <= 1.05 * sum(saved.values())
    assert carry.losses


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_graph_that_no_backward_uses_leaves_nothing_behind(recompute: str) -> None:
    run = trainer(tiny("precision.compute=float32", f"model.recompute={recompute}"))
    batch = run.data.batch(run.progress, 1)
    run.model(batch, Progress())  # tables that are made once
    with Made() as made:
        carry = run.model(batch, Progress())
    assert made.alive() > 0
    del carry
    assert made.alive() == 0


def test_who_looks_at_values_is_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    def peek(self: object, batch: Batch, now: Progress) -> None:
        batch.tokens.max().item()

    monkeypatch.setattr("tangram.core.model.Model.forward", peek)
    with pytest.raises(UnpredictableError, match="item"):
        predict(tiny())

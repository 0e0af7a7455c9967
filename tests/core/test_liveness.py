"""The verdict on every named piece, and a mutant of each that it must catch."""

import pytest
import torch
from attrs import evolve
from tiny import tiny

from tangram.core.assembly import assemble
from tangram.core.liveness import MIN_STEPS, Liveness, Piece, objective_gradients
from tangram.core.records import IGNORE, Batch, Loss, RouterStats
from tangram.core.step import Trainer, train_step
from tangram.plugins.moe.balancers import AuxFree
from tangram.plugins.objectives.balance import SequenceBalance
from tangram.plugins.objectives.mtp import MTP


def _verdicts(*overrides: str, steps: int = MIN_STEPS, trained: bool = False) -> dict[str, Piece]:
    run = assemble(tiny("model.blocks.1.repeat=1", "train.batch_sequences=2", "train.micro_sequences=2", *overrides))
    liveness = Liveness()
    biases = {layer: bias.tolist() for layer, bias in run.model.biases().items()}
    liveness.begin(run.model.experts, biases, trained=trained)
    for _ in range(steps):
        weights = run.model.weights(run.progress)
        liveness.observe(train_step(run, _batch(run)), weights)
    return {piece.name: piece for piece in liveness.judge(run.model, _batch(run), run.progress)}


def _batch(run: Trainer) -> Batch:
    return run.data.batch(run.progress, 2)


def _dead(verdicts: dict[str, Piece]) -> set[str]:
    return {name for name, piece in verdicts.items() if not piece.alive}


def test_every_piece_of_a_healthy_run_is_alive() -> None:
    verdicts = _verdicts()
    assert set(verdicts) == {
        "objectives.next_token",
        "objectives.mtp",
        "objectives.sequence_balance",
        *(f"balancer of layer {layer}" for layer in (1, 2)),
    }
    assert not _dead(verdicts), verdicts


def test_a_short_run_is_too_short_to_tell() -> None:
    verdicts = _verdicts(steps=3)
    assert len(verdicts) == 5
    assert all(piece.alive is None and "too few to tell" in piece.why for piece in verdicts.values())


def test_mutant_biases_that_are_never_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AuxFree, "update", lambda self, load, now: None)
    verdicts = _verdicts()
    assert _dead(verdicts) == {f"balancer of layer {layer}" for layer in (1, 2)}
    assert "the biases never moved under a load violation" in verdicts["balancer of layer 1"].why


def test_losses_fall_only_where_weights_were_not_trained_before() -> None:
    still = ("train.lr=0.0",)
    assert _dead(_verdicts(*still)) == {"objectives.next_token", "objectives.mtp"}
    verdicts = _verdicts(*still, trained=True)
    assert not _dead(verdicts), verdicts


def test_a_balancer_whose_biases_are_to_stay_is_not_judged() -> None:
    assert not any("balancer" in name for name in _verdicts("model.block.feedforward.balancer.speed=0.0", steps=1))


def test_a_balancer_that_is_meant_to_do_nothing_is_not_judged() -> None:
    assert not any("balancer" in name for name in _verdicts("model.block.feedforward.balancer={use: none}"))


def test_mutant_sequence_loss_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = SequenceBalance.__call__

    def detached(self: SequenceBalance, stats: RouterStats, batch: Batch) -> torch.Tensor:
        return alive(self, evolve(stats, affinity=stats.affinity.detach()), batch)

    monkeypatch.setattr(SequenceBalance, "__call__", detached)
    verdicts = _verdicts()
    assert _dead(verdicts) == {"objectives.sequence_balance"}
    assert "no gradient" in verdicts["objectives.sequence_balance"].why


def test_mutant_loss_whose_weight_is_zero_all_along() -> None:
    verdicts = _verdicts("objectives.sequence_balance.weight=0.0")
    assert _dead(verdicts) == {"objectives.sequence_balance"}
    assert "weight was 0" in verdicts["objectives.sequence_balance"].why


def test_a_loss_whose_weight_ends_at_zero_was_alive() -> None:
    curve = f"[{{until_step: {MIN_STEPS - 10}, value: 0.05}}, {{value: 0.0}}]"
    assert not _dead(_verdicts(f"objectives.sequence_balance.weight={curve}"))


@pytest.mark.parametrize("how", ["detached", "ignored"])
def test_mutant_mtp_that_does_not_learn(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = MTP.phases

    def mutant(self: MTP, name: str, batch: Batch, shared: object) -> list:
        assert batch.targets is not None
        if how == "ignored":
            batch = evolve(batch, targets=torch.full_like(batch.targets, IGNORE))
        found = phases(self, name, batch, shared)
        if how != "detached":
            return found
        score = found[-1]

        def cut(carry):
            carry = score.fn(carry)
            *others, (last, loss) = carry.losses
            return evolve(carry, losses=(*others, (last, Loss(loss.value.detach()))))

        return [*found[:-1], score._replace(fn=cut)]

    monkeypatch.setattr(MTP, "phases", mutant)
    assert "objectives.mtp" in _dead(_verdicts())


def test_mutant_weights_that_are_never_stepped() -> None:
    verdicts = _verdicts("train.lr=0.0")
    assert _dead(verdicts) == {"objectives.next_token", "objectives.mtp"}
    assert "it did not fall" in verdicts["objectives.mtp"].why


def test_the_gradient_of_each_loss_is_its_own() -> None:
    run = assemble(tiny())
    batch = _batch(run)
    norms = objective_gradients(run.model, batch, run.progress)
    assert set(norms) == {"next_token", "mtp", "sequence_balance"}
    assert all(norm > 0 for norm in norms.values())
    assert all(p.grad is None for p in run.model.parameters())
    alone = assemble(tiny("objectives={mtp: null, sequence_balance: null}"))
    assert objective_gradients(alone.model, batch, alone.progress)["next_token"] == pytest.approx(norms["next_token"])

"""The average is what its recurrence says, survives a crash, and changes no number of the run."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from tangram.core import checkpoint, load_run
from tangram.core.evaluation import set_weights
from tangram.core.plugins import run_manager
from tangram.core.records import GradientNorm, Progress, Result, StepReport, Verdict
from tangram.core.run import train
from tangram.core.session import RunError, RunView
from tangram.core.step import train_step
from tangram.plugins.observers.ema import EMA, EMAConfig
from tangram.testing import tolerance

STEPS = "train.tokens=288"  # six
NAME = "observer-ema"


class Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 5))
        self.register_buffer("bias", torch.ones(2))

    def draw(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def ended(verdict: Verdict = Verdict.ACCEPT) -> StepReport:
    return StepReport(Progress(), Progress(1), 0.1, Result({}, 1.0, torch.zeros(1, 1), 1), GradientNorm(1.0), verdict)


@given(
    decay=st.floats(0.0, 0.999),
    verdicts=st.lists(st.sampled_from([Verdict.ACCEPT, Verdict.SKIP]), max_size=8),
    seed=st.integers(0, 99),
)
def test_it_is_the_weighted_sum_of_the_weights_after_accepted_steps(decay, verdicts, seed):
    model, ema, stream = Weights(), EMAConfig(decay=decay).build(), torch.Generator().manual_seed(seed)
    model.draw(stream)
    ema.tangram_model_built(model=model)
    history = [model.a.detach().double().clone()]
    for verdict in verdicts:
        model.draw(stream)
        ema.tangram_step_ended(report=ended(verdict))
        if verdict is Verdict.ACCEPT:
            history.append(model.a.detach().double().clone())
    state = ema.state()
    n = len(history) - 1
    shares = [decay**n] + [(1 - decay) * decay ** (n - i) for i in range(1, n + 1)]
    expected = sum(share * weights for share, weights in zip(shares, history, strict=True))
    assert state.keys() == {"a", "b"}  # the biases are no parameters
    assert state["a"].dtype == torch.float32
    size = max(float(weights.abs().max()) for weights in history)
    assert (state["a"] - expected).abs().max() <= tolerance(torch.float32, n + 1) * size
    ema.tangram_run_ended()


def test_weights_that_do_not_move_are_their_own_average_exactly():
    model, ema = Weights(), EMAConfig(decay=0.7).build()
    model.draw(torch.Generator().manual_seed(1))
    ema.tangram_model_built(model=model)
    for _ in range(5):
        ema.tangram_step_ended(report=ended())
    assert torch.equal(ema.state()["b"], model.b)
    ema.tangram_run_ended()


@pytest.fixture
def held() -> tuple[EMA, Weights, threading.Event]:
    """Return an average whose worker waits for the event before it does anything."""
    model, ema, go = Weights(), EMAConfig(decay=0.5).build(), threading.Event()
    ema.tangram_model_built(model=model)
    ema._worker.submit(go.wait)
    return ema, model, go


def test_the_step_does_not_wait_and_what_comes_after_it_is_not_averaged(held):
    ema, model, go = held
    model.a.data.fill_(2.0)
    ema.tangram_step_ended(report=ended())  # returns though the worker stands
    model.a.data.fill_(100.0)
    go.set()
    assert ema.state()["a"].tolist() == [1.0] * 3
    ema.tangram_run_ended()


def test_the_next_step_waits_for_the_update_before_it_takes_another_snapshot(held):
    ema, model, go = held
    model.a.data.fill_(2.0)
    ema.tangram_step_ended(report=ended())
    model.a.data.fill_(4.0)
    threading.Timer(0.05, go.set).start()
    ema.tangram_step_ended(report=ended())
    assert go.is_set()
    assert ema.state()["a"].tolist() == [2.5] * 3
    ema.tangram_run_ended()


def test_an_error_of_the_worker_is_raised_at_the_next_step():
    model, ema = Weights(), EMAConfig().build()
    ema.load_state({"a": torch.zeros(4), "b": torch.zeros(5)})
    ema.tangram_model_built(model=model)
    ema.tangram_step_ended(report=ended())
    with pytest.raises(RuntimeError, match="size of tensor"):
        ema.tangram_step_ended(report=ended())
    ema.tangram_run_ended()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny(STEPS, "train.checkpoint_every=2", "observers.ema.decay=0.9"), directory)
    return directory


class Counting(EMA):
    """An average that keeps a tensor of no address besides."""

    def state(self):
        return {**super().state(), "seen": torch.tensor([3.0])}


def test_on_one_rank_all_that_an_average_keeps_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(EMAConfig, "build", lambda config: Counting(config.decay))
    train(tiny(STEPS), tmp_path)
    assert averages(tmp_path)["seen"].tolist() == [3.0]


def averages(directory: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_file(directory / "checkpoints" / "step-6", NAME)


def test_interrupted_and_resumed_it_is_the_same_bit_for_bit(whole, tmp_path, monkeypatch):
    experiment, taken = load_run(whole).experiment, []

    def dying(run, batch):
        taken.append(1)
        if len(taken) == 4:
            raise RuntimeError("power cut")
        return train_step(run, batch)

    monkeypatch.setattr("tangram.core.session.train_step", dying)
    with pytest.raises(RuntimeError, match="power cut"):
        train(experiment, tmp_path / "run")
    monkeypatch.undo()
    train(experiment, tmp_path / "run", resume=True)
    resumed, expected = averages(tmp_path / "run"), averages(whole)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[address], expected[address]) for address in expected)


def test_a_run_is_loaded_with_its_averaged_weights_and_its_own_biases(whole):
    last, averaged = load_run(whole).model, load_run(whole, averaged=True).model
    kept = averages(whole)
    assert kept.keys() == dict(averaged.named_parameters()).keys()
    assert all(torch.equal(parameter, kept[address]) for address, parameter in averaged.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(last.buffers(), averaged.buffers(), strict=True))
    assert not torch.equal(last.head.weight, averaged.head.weight)


def test_averaged_weights_that_were_not_kept_are_missed(tmp_path):
    train(tiny("train.tokens=48", "observers.ema=null"), tmp_path / "run")
    with pytest.raises(RunError, match=r"observers\.ema="):
        load_run(tmp_path / "run", averaged=True)


def test_an_average_of_other_weights_is_refused(whole):
    with pytest.raises(KeyError, match="other is in only one"):
        set_weights(load_run(whole).model, averages(whole) | {"other": torch.zeros(3)})


@settings(max_examples=5)
@given(decay=st.sampled_from([-0.1, 1.0, 1.5]))
def test_a_decay_that_is_no_average_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        EMAConfig(decay=decay)


def test_it_watches_as_a_registered_observer(tmp_path):
    ema, model = EMAConfig(decay=0.0).build(), Weights()
    hook = run_manager({"ema": ema}).hook
    run = RunView(tiny(), tmp_path, Progress(), {}, 0)
    hook.tangram_model_built(run=run, model=model)
    model.a.data.fill_(3.0)
    hook.tangram_step_ended(run=run, report=ended())
    assert ema.state()["a"].tolist() == [3.0] * 3
    hook.tangram_run_ended(run=run, error=None)

"""A run that is killed and resumed ends as one that never was: bit for bit, wherever it was killed."""

import random
import signal
from pathlib import Path

import pytest
from runs import ended, essence, training, write_preset

STEPS = 40
SHORT = (f"train.tokens={STEPS * 4 * 12}", "train.checkpoint_every=5")
V3_TINY = (
    f"train.tokens={STEPS * 2 * 64}",
    "train={sequence_length: 64, micro_sequences: 1, batch_sequences: 2}",
    "train.checkpoint_every=8",
    "train.evaluate_every=0",
    "data={use: synthetic}",
    "observers={console: null, fate: {use: fate}}",
)
SWAPPED = {
    "muon": "optimizer={use: muon}",
    "bfloat16 moments": "optimizer.moments=bfloat16",
    "skip": "guard={use: skip}",
    "rollback": "guard={use: rollback, window: 5}",
    "another decay": "observers.ema.decay=0.5",
    "float64": "precision.compute=float64",
}


def fates(count: int, seed: int, seconds: float) -> list[str]:
    """Return ways to die: between steps, in the middle of saving, and at any moment, in turn."""
    draw = random.Random(seed)
    kinds = ("step", "sync", "timer", "rename")
    limits = {"step": STEPS - 1, "sync": 30, "rename": 5}
    return [
        f"timer:{draw.uniform(0.05, seconds):.3f}" if kind == "timer" else f"{kind}:{draw.randint(1, limits[kind])}"
        for kind in (kinds[i % len(kinds)] for i in range(count))
    ]


def survives(preset: Path | str, overrides: tuple[str, ...], whole: Path, out: Path, fate: str) -> None:
    code, said = ended(training(preset, out, *overrides, ends=fate))
    assert code in (-signal.SIGKILL, -signal.SIGALRM, 0), f"{fate}: {said}"  # 0: the timer came too late
    if code == 0:
        assert fate.startswith("timer"), f"{fate} did not come"
    resume = ["--resume"] if (out / "experiment.yaml").exists() else []
    code, said = ended(training(preset, out, *overrides, *resume))
    assert code == 0, f"{fate}: {said}"
    assert not resume or "resuming from" in said or "starting from the first step" in said
    expected, found = essence(whole, STEPS), essence(out, STEPS)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], f"{fate}: {name} differs"


@pytest.mark.parametrize("fate", fates(4, seed=0, seconds=1.0))
def test_killed_and_resumed(fate: str, tmp_path: Path, reference: Path, preset: Path) -> None:
    survives(preset, (), reference, tmp_path / "run", fate)


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset") / "short.yaml", *SHORT)


@pytest.fixture(scope="module")
def reference(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, said = ended(training(preset, out))
    assert code == 0, said
    return out


@pytest.fixture(scope="module")
def v3_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, said = ended(training("v3-tiny", out, *V3_TINY))
    assert code == 0, said
    return out


@pytest.mark.soak
@pytest.mark.parametrize("fate", fates(20, seed=1, seconds=12.0))
def test_v3_tiny_killed_and_resumed(fate: str, tmp_path: Path, v3_tiny: Path) -> None:
    survives("v3-tiny", V3_TINY, v3_tiny, tmp_path / "run", fate)


@pytest.mark.soak
@pytest.mark.parametrize("swapped", SWAPPED)
def test_every_stateful_component_killed_and_resumed(swapped: str, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "short.yaml", *SHORT, SWAPPED[swapped])
    code, said = ended(training(preset, tmp_path / "whole"))
    assert code == 0, said
    for i, fate in enumerate(fates(5, seed=2, seconds=1.0)):
        survives(preset, (), tmp_path / "whole", tmp_path / f"run-{i}", fate)

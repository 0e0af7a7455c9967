"""A run that is killed and resumed ends as one that never was: bit for bit, wherever it was killed."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from whole_runs import FATE, essence, trained, write_preset

from tangram.core.cli import main

STEPS = 40
SHORT = (f"train.tokens={STEPS * 4 * 12}", "train.micro_sequences=2", "train.checkpoint_every=5")
V3_TINY = (
    f"train.tokens={STEPS * 2 * 64}",
    "train={sequence_length: 64, micro_sequences: 1, batch_sequences: 2}",
    "train.checkpoint_every=8",
    "train.evaluate_every=0",
    "data={use: synthetic}",
    "optimizer={use: adamw, moments: bfloat16}",
    "observers={console: null, fate: {use: fate}}",
)
"""With the paper's optimizer, whose steps and files are smaller; muon has its turn below."""

ROLLS_BACK = "guard={use: rollback, window: 5, spike: 1.5, limit: 99}"
"""One deviation and a half is a spike: there are rollbacks all along, and a kill may come in the middle of one."""

TEXT = "data={use: text, corpus: files, files: [TEXTS], held_out_every: 4}"
SWAPPED = {
    "muon": ("optimizer={use: muon}",),
    "bfloat16 moments": ("optimizer.moments=bfloat16",),
    "guard skip": ("guard={use: skip}",),
    "guard rollback": (ROLLS_BACK,),
    "no ema": ("observers.ema=null",),
    "text": (TEXT, "model.vocab_size=300"),
    "tokens": ("data={use: tokens, folder: TOKENS}", "model.vocab_size=300"),
}
"""Whatever keeps state, or tells batches by it, in place of what `SHORT` has: adamw in float32, synthetic data."""


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
    code, said = trained(preset, out, *overrides, ends=fate)
    assert code in (-signal.SIGKILL, -signal.SIGALRM, 0), f"{fate}: {said}"  # 0: the timer came too late
    if code == 0:
        assert fate.startswith("timer"), f"{fate} did not come"
    resume = ["--resume"] if (out / "experiment.yaml").exists() else []
    code, said = trained(preset, out, *overrides, *resume)
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
    code, said = trained(preset, out)
    assert code == 0, said
    return out


@pytest.fixture(scope="module")
def v3_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, said = trained("v3-tiny", out, *V3_TINY)
    assert code == 0, said
    return out


@pytest.mark.soak
@pytest.mark.parametrize("fate", fates(20, seed=1, seconds=12.0))
def test_v3_tiny_killed_and_resumed(fate: str, tmp_path: Path, v3_tiny: Path) -> None:
    survives("v3-tiny", V3_TINY, v3_tiny, tmp_path / "run", fate)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield where there is text, and where its tokens are."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i} says {'this and that ' * (1 + i % 5)}\n" * 2)
    places = {"TEXTS": f"'{folder}/*.txt'", "TOKENS": str(folder / "tokens")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        text = write_preset(folder / "text.yaml", *placed(SWAPPED["text"], places))
        with pytest.raises(SystemExit) as exited:
            main(["tokenize", str(text), places["TOKENS"], "--plugin", str(FATE)])
        assert not exited.value.code
        yield places


def placed(overrides: tuple[str, ...], places: dict[str, str]) -> tuple[str, ...]:
    return tuple(text.replace("TEXTS", places["TEXTS"]).replace("TOKENS", places["TOKENS"]) for text in overrides)


@pytest.mark.soak
@pytest.mark.parametrize("swapped", SWAPPED)
def test_every_stateful_component_killed_and_resumed(swapped: str, tmp_path: Path, texts: dict[str, str]) -> None:
    preset = write_preset(tmp_path / "short.yaml", *SHORT, *placed(SWAPPED[swapped], texts))
    code, said = trained(preset, tmp_path / "whole")
    assert code == 0, said
    rollbacks = (tmp_path / "whole/metrics.jsonl").read_text().count('"rollback"')
    assert (rollbacks >= 3) == (swapped == "guard rollback")
    for i, fate in enumerate(fates(5, seed=2, seconds=1.0)):
        survives(preset, (), tmp_path / "whole", tmp_path / f"run-{i}", fate)

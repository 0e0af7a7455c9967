"""Studies of a model so small that a cell takes milliseconds."""

from collections.abc import Mapping
from pathlib import Path

from tangram.core.plugins import Plugins
from tangram.core.study import Study, read_study

NURSERY = Path(__file__).with_name("nursery.py")
STEPS = 6

PRESET = """\
extends: gqa-baseline
model:
  dim: 8
  vocab_size: 16
  init_std: 0.1
  block:
    attention: {use: gqa, n_heads: 2, n_kv_heads: 1, head_dim: 4}
    feedforward: {use: swiglu, hidden: 8}
  blocks: [{repeat: 1}]
data: {use: synthetic}
optimizer: {use: adamw}
observers: {console: null, ema: null, doom: {use: doom}}
train:
  sequence_length: 8
  micro_sequences: 1
  batch_sequences: 1
  tokens: 48
  lr: [{until: 24, value: 0.01}, {value: 0.001}]
  evaluate_every: 0
  checkpoint_every: 2
  prompt: ""
"""

STUDY = """\
name: toy
base: ./toy.yaml
seeds: 3
axes:
  feedforward:
    wide: {model: {block: {feedforward: {hidden: 16}}}}
metrics: {loss.next_token: lower}
launcher: {use: forking}
"""


def write(folder: Path, replace: Mapping[str, str] | None = None, preset: Mapping[str, str] | None = None) -> Path:
    """Write the toy study and its preset with replacements; return the study file."""
    for name, text, changes in (("toy.yaml", PRESET, preset), ("study.yaml", STUDY, replace)):
        for old, new in (changes or {}).items():
            assert old in text, old
            text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "study.yaml"


def plugins() -> Plugins:
    return Plugins.discover([NURSERY])


def study(folder: Path, replace: Mapping[str, str] | None = None, preset: Mapping[str, str] | None = None) -> Study:
    """Write the toy study with replacements, and read it."""
    return read_study(write(folder, replace, preset), plugins())

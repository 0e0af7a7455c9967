"""transformers, offline, and so imported that it does not take our folder `kernels` for a library of that name."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

os.environ["HF_HUB_OFFLINE"] = "1"
_path = sys.path.copy()
sys.path[:] = [entry for entry in _path if Path(entry).resolve() != ROOT]
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM  # noqa: E402
from transformers.modeling_layers import MtpModel  # noqa: E402

sys.path[:] = _path

__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "DeepseekV3Config", "DeepseekV3ForCausalLM", "MtpModel"]

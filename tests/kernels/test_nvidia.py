"""Every kernel is assembled for NVIDIA's GPUs, and fits a core of one; no GPU is needed for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "nvidia.py"

MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Most bytes of shared memory of a block, by compute capability (CUDA C++ Programming Guide, table of capabilities)."""

REGISTERS = 65_536
"""Registers of a core."""

PRODUCTS = {"_attend", "_product", "_rows_kernel", "_weight_kernel"}
FP8 = {"_product", "_quantize", "_gated_quantized"}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def assembled(capability: int, folder: Path, *arguments: str) -> list[dict[str, object]]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), str(capability), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def launched() -> set[str]:
    """Return the names of all kernels that a module launches."""
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "kernels").glob("*.py")]
    return {name for text in texts for name in re.findall(r"^ +(_\w+)\[\(", text, re.MULTILINE)}


def assert_fit(found: list[dict[str, object]], capability: int) -> None:
    for each in found:
        assert each["shared"] <= MEMORY[capability], each
        assert each["registers"] * 32 * each["warps"] <= REGISTERS, each


def test_at_the_shapes_of_deepseek_v3_for_hopper(tmp_path):
    found = assembled(90, tmp_path)
    assert {each["kernel"] for each in found} == launched()
    assert_fit(found, 90)
    for each in found:
        assert each["stack"] <= 64, f"{each} keeps in memory what registers should hold"
        assert (TENSOR_CORES[90] in each["tensor_cores"]) == (each["kernel"] in PRODUCTS), each


@pytest.mark.soak
@pytest.mark.parametrize("capability", MEMORY)
def test_in_all_shapes_and_dtypes(capability, tmp_path):
    found = assembled(capability, tmp_path, "--all")
    assert {each["kernel"] for each in found} == launched() - (FP8 if capability < 89 else set())
    assert_fit(found, capability)
    of_products = [each for each in found if TENSOR_CORES[capability] in each["tensor_cores"]]
    assert {each["kernel"] for each in of_products} == PRODUCTS - (FP8 if capability < 89 else set())

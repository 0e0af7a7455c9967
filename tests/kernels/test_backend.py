"""Which path is taken, said by the environment or by `use`; what cannot be is refused with what to do."""

import os
import subprocess
import sys
from threading import Thread

import pytest
import torch

from tangram import kernels
from tangram.kernels import backend, jit
from tangram.kernels.backend import BackendError, chosen, takes_kernel

ON_CPU = torch.ones(1)

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"
"""Makes every import of Triton fail, as where it is not installed."""

BOTH = """
import os, sys, torch
from tangram import kernels
from tangram.kernels import backend
from tangram.kernels.backend import BackendError, takes_kernel
kernels.quantize_tiles(torch.ones(2, 3))
kernels.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), 1.0, gradients=True)
print(kernels.paths()["cpu"])
print(sum(name.split(".")[0] == "triton" and module is not None for name, module in sys.modules.items()))
os.environ["TANGRAM_KERNELS"] = "triton"
backend._by_environment.cache_clear()
try:
    kernels.quantize_tiles(torch.ones(2, 3))
except BackendError as error:
    print(error)
"""
"""Runs operations by default and says which path they took; and then as Triton kernels, which cannot be."""

NOT_HERE = "no Triton kernel runs here for tensors on cpu: "
OR_ELSE = ", or set TANGRAM_KERNELS=reference"
INTERPRET = "move them to a GPU, or set TRITON_INTERPRET=1 before Python starts"


def printed(code: str, **environment: str) -> list[str]:
    """Return the lines that a fresh Python prints, with these of the two variables set."""
    kept = {key: value for key, value in os.environ.items() if key not in ("TANGRAM_KERNELS", "TRITON_INTERPRET")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_cpu_takes_the_twins_and_imports_no_triton():
    assert printed(BOTH) == ["plain torch (auto by the default)", "0", NOT_HERE + INTERPRET + OR_ELSE]


def test_a_process_without_triton_goes_the_same_way():
    lines = printed(WITHOUT_TRITON + BOTH, TRITON_INTERPRET="1")
    assert lines == ["plain torch (auto by the default)", "0", NOT_HERE + "install the package triton" + OR_ELSE]


def test_the_environment_turns_the_kernels_on():
    code = "import torch\nfrom tangram import kernels\nprint(kernels.paths()['cpu'])\n" + (
        "codes, _ = kernels.quantize_tiles(torch.full((1, 2), 7.0))\nprint(codes.float().tolist())"
    )
    lines = printed(code, TANGRAM_KERNELS="triton", TRITON_INTERPRET="1")
    assert lines == ["the Triton kernel in the interpreter (triton by TANGRAM_KERNELS)", "[[448.0, 448.0]]"]


def test_the_innermost_use_wins_and_ends_with_its_block():
    outside = chosen()
    with kernels.use("triton"):
        with kernels.use("reference"):
            assert (chosen(), takes_kernel(ON_CPU)) == ("reference", False)
        assert chosen() == "triton"
    assert chosen() == outside
    with pytest.raises(KeyError), kernels.use("triton"):
        raise KeyError
    assert chosen() == outside


def test_a_use_is_for_every_thread():
    seen = []
    with kernels.use("reference"):
        thread = Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_a_choice_that_is_none_is_refused_and_changes_nothing(monkeypatch):
    outside = chosen()
    with pytest.raises(BackendError, match=r"kernels.use is 'cuda'; it is auto, reference or triton"):
        kernels.use("cuda").__enter__()
    assert chosen() == outside
    monkeypatch.setenv("TANGRAM_KERNELS", "Triton")
    backend._by_environment.cache_clear()
    with pytest.raises(BackendError, match=r"TANGRAM_KERNELS is 'Triton'; it is auto, reference or triton"):
        takes_kernel(ON_CPU)


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("choice", ["auto", "reference", "triton"])
def test_what_is_said_of_a_path_is_what_happens(choice, interpreted, installed, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", interpreted)
    monkeypatch.setattr(backend, "INSTALLED", installed)
    with kernels.use(choice):
        said = kernels.paths()
        try:
            happens = "the Triton kernel in the interpreter" if takes_kernel(ON_CPU) else "plain torch"
        except BackendError as error:
            happens = f"an error: {error}"
    assert said["cpu"] == f"{happens} ({choice} by kernels.use)"
    assert happens.startswith("an error") == (choice == "triton" and not (interpreted and installed))
    assert ("install the package" in happens) == (choice == "triton" and not installed)
    assert ("TRITON_INTERPRET=1" in happens) == (choice == "triton" and not interpreted)
    on_gpu = "plain torch" if choice == "reference" else "the Triton kernel" if installed else "an error: no Triton"
    assert said["cuda"].startswith(on_gpu)


def test_a_placeholder_lets_definitions_be_read_past():
    placeholder = jit._Placeholder()

    @placeholder.jit
    def kernel(x: placeholder.constexpr) -> int:
        return x

    assert kernel(3) == 3

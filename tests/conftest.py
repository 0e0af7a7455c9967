"""One thread, a Hypothesis profile (TANGRAM_PROFILE=dev, ci or soak), and no file imported twice."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from imports import imported_twice

# Without a GPU the kernels run in Triton's interpreter, which has to be said before they are defined. The processes
# that tests start are like a user's: without it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import tangram.kernels  # noqa: F401

if os.environ.get("TRITON_INTERPRET"):
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]

from tangram.testing import Contract

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True, database=None)
settings.register_profile("soak", max_examples=2000, deadline=None)

REPEATS = 20

PROFILE = os.environ.get("TANGRAM_PROFILE") or ("ci" if os.environ.get("CI") else "dev")


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if PROFILE not in ("dev", "ci", "soak"):
        raise pytest.UsageError(f"TANGRAM_PROFILE is dev, ci or soak, not {PROFILE!r}")
    settings.load_profile(PROFILE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In the soak, try every law of every component again and again, from other seeds: none may fail now and then."""
    if PROFILE == "soak" and metafunc.cls is not None and issubclass(metafunc.cls, Contract):
        metafunc.fixturenames.append("repeat")
        metafunc.parametrize("repeat", [pytest.param(i, marks=pytest.mark.soak) for i in range(REPEATS)], indirect=True)


@pytest.fixture
def repeat(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if PROFILE == "soak":
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session", autouse=True)
def one_name_for_each_file() -> Iterator[None]:
    yield
    lines = imported_twice(sys.modules, Path(__file__).parents[1])
    assert not lines, "; ".join(lines)

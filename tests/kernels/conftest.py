"""Every kernel writes into memory that is full of NaN: what it forgets to write is seen."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def outputs_begin_as_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)

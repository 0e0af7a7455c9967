"""What laws are tried on, put where they are tried."""

from typing import TypeVar

from torch import Tensor, nn

from tangram.core.islands import mapped

_T = TypeVar("_T")


def placed(value: _T, device: str) -> _T:
    """Return a tensor, tensors in a record or tuple, or a module on a device; what has no memory stays without."""

    def put(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else tensor.to(device)

    if isinstance(value, nn.Module):
        value._apply(put)
        return value
    return mapped(put, value)

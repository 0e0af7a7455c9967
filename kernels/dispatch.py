"""What is seen of operations as they run: a mode that sees each, and where their tensors lie."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SeesOperations(TorchDispatchMode):
    """A mode whose `__torch_dispatch__` sees every operation inside it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, for a second, to keep this from being compiled


def tensors_in(values: object) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def place_of(tensor: Tensor) -> int:
    """Return where a tensor's storage object lies: its data lies nowhere on the device meta."""
    return int(tensor.untyped_storage()._cdata)

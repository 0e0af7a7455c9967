"""Operations that are recorded once and run again on the same memory, as a CUDA graph does on a GPU.

Of a few tokens an operation takes microseconds on a CPU, and the Python between two of them often more. Recorded, a
function comes down to a list of calls whose operands and results have their places: views and allocations have been
done, and what is left is the work. A call that is neither the operation itself nor a plain copy gave its bits once.

A function may be recorded if it does the same operations whatever its tensors hold. It is not recorded if it looks at
them from Python, or goes through operations of others than torch and this package, such as those between processes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from attrs import frozen
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tangram.kernels.backend import chosen
from tangram.kernels.dispatch import SeesOperations, place_of, tensors_in

_T = TypeVar("_T")

_LOOKS = frozenset(
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "data_ptr", "__bool__", "__int__", "__float__", "__index__", "__contains__")
)
"""Ways from a tensor to its values, or past torch to its memory."""

_ALLOCATES = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))
_COPIES = frozenset(("clone", "contiguous", "to", "_to_copy"))
_ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))


@frozen(eq=False)
class Recording:
    """What a function did.

    Attributes:
        calls: Its operations in order, each ready to be called.
        refused: Why they cannot stand for the function; None if they can.
        held: What keeps the memory that they work on.
    """

    calls: list[Callable[[], object]]
    refused: str | None
    held: list[object]

    def replay(self) -> None:
        """Do the operations again: read what now lies where the operands lay, and write over the results."""
        for call in self.calls:
            call()


def records(x: Tensor) -> bool:
    """Return whether operations on `x` are worth a recording: on a CPU, where nothing is to be differentiated."""
    return torch.is_inference_mode_enabled() and x.device.type == "cpu" and chosen() == "auto"


def record(fn: Callable[[], _T]) -> tuple[_T, Recording]:
    """Return what fn() does, and the recording of it. It must run in inference mode or without gradients."""
    recorder = _Recorder()
    with _opened(recorder), _Watch(recorder), recorder:
        out = fn()
    return out, Recording(recorder.calls, recorder.refused, recorder.held)


def call(function: Callable[..., object], *arguments: Tensor | float) -> object:
    """Return what a function of C gives for the places of these tensors and for these numbers."""
    if not _open:
        return function(*(each.data_ptr() if isinstance(each, Tensor) else each for each in arguments))
    return _open[-1].call(function, arguments)


_open: list["_Recorder"] = []


@contextmanager
def _opened(recorder: "_Recorder") -> Iterator[None]:
    _open.append(recorder)
    try:
        yield
    finally:
        _open.pop()


class _Recorder(SeesOperations):
    """Turns every operation into a call that writes its result where it lies now."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.refused: str | None = None
        self.own = False  # whether it is this package that asks where a tensor lies
        self.held: list[object] = []

    def refuse(self, reason: str) -> None:
        self.refused = self.refused or reason

    def call(self, function: Callable[..., object], arguments: tuple[Tensor | float, ...]) -> object:
        self.own = True
        places = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        self.own = False
        self.held += arguments  # a place is a number, which keeps no memory
        self.calls.append(partial(function, *places))
        return function(*places)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace not in ("aten", "tangram"):
            self.refuse(f"{func} is not an operation of torch")
        elif torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.refuse(f"{func} looks at values")
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self.refuse(f"{func} draws random numbers")
        elif func._schema.is_mutable:
            self.calls.append(partial(func, *args, **kwargs))
        elif func._schema.name.partition("::")[2] not in _ALLOCATES and not _is_view(out, (args, kwargs)):
            self.calls.append(_writing(func, args, kwargs, out))
        return out


class _Watch(TorchFunctionMode):
    """Sees whether Python looks at a tensor's values."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _LOOKS and not self._recorder.own:
            self._recorder.refuse(f"Python looks at a tensor: {func.__name__}")
        return func(*args, **(kwargs or {}))


def _is_view(out: object, operands: object) -> bool:
    """Return whether all results lie in the memory of operands, so that nothing was computed."""
    given = set(map(place_of, tensors_in(operands)))
    return all(place_of(tensor) in given for tensor in tensors_in(out))


def _writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> Callable[[], object]:
    """Return the cheapest call that makes `out` again where it is."""
    if isinstance(out, Tensor):
        name = func._schema.name.partition("::")[2]
        if name in _COPIES:
            return partial(out.copy_, args[0])
        if name in _ZEROS:
            return out.zero_
        packet = getattr(torch.ops.aten, name, None)
        for way in (getattr(torch, name, None), getattr(packet, "out", None), packet):
            written = None if way is None else partial(way, *args, **kwargs, out=out)
            if written is not None and _gives(written, out):
                return written

    results = tensors_in(out)

    def again() -> None:
        for result, made in zip(results, tensors_in(func(*args, **kwargs)), strict=True):
            result.copy_(made)

    return again


def _gives(written: Callable[[], object], result: Tensor) -> bool:
    """Return whether a call writes the result once more, bit for bit."""
    before, place = result.clone(), (result.shape, result.stride())
    result.fill_(1 if result.dtype is torch.bool else 111)
    try:
        written()
    except (TypeError, RuntimeError, ValueError):
        same = False
    else:
        same = (result.shape, result.stride()) == place and torch.equal(result, before)
    if not same:
        result.copy_(before)
    return same

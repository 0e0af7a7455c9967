"""An accelerator made of this machine: a device with streams, on which torch computes as on a GPU and nothing is fast.

Its tensors are of the device `emulated`; their bytes lie in this process's memory, where the CPU's operations work on
them. What mixes it with the CPU fails as it would on a GPU; an operation is the plain one, for a CPU's own kernels see
another device; backward runs in a thread of its own. Streams are names: operations run when they are issued, and
`Timeline` finds out what real streams could have run in another order.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getfile
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tangram.testing import run_ranks

DEVICE = "emulated:0"
"""The device, where `set_up` made it known."""

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_READ = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")
"""Operations whose result the host must know before it goes on."""

Clock = dict[int, int]
"""How much of each stream is known to be done: its first so many operations."""


class Timeline:
    """What was used on which stream, and what is known to be done before what.

    Attributes:
        faults: What real streams could have run in another order, or on memory that was given away, in words.
        waits: Operations for which the host waited.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.waits: list[str] = []
        self._clocks: dict[int, Clock] = defaultdict(dict)
        self._host: Clock = {}
        self._written: dict[int, tuple[int, int, str]] = {}
        self._read: dict[int, dict[int, tuple[int, str]]] = defaultdict(dict)
        self._owner: dict[int, int] = {}
        self._held: dict[int, set[int]] = defaultdict(set)

    def clock(self, stream: int) -> Clock:
        """Return what is done once all that was issued on a stream is done."""
        return dict(self._clocks[stream])

    def wait(self, stream: int, clock: Clock) -> None:
        """Let a stream go on only when `clock` is done."""
        _advance(self._clocks[stream], clock)

    def allocate(self, place: int, stream: int) -> None:
        """Give memory to what runs on a stream."""
        self._owner[place] = stream
        for known in (self._written, self._read, self._held):
            known.pop(place, None)

    def hold(self, place: int, stream: int) -> None:
        """Keep memory from being given away before what was issued on a stream is done."""
        self._held[place].add(stream)

    def run(self, name: str, reads: set[int], writes: set[int], stream: int, *, waited_for: bool) -> None:
        """Issue an operation on a stream."""
        clock = self._clocks[stream]
        _advance(clock, self._host)
        clock[stream] = now = clock.get(stream, 0) + 1
        for place in reads | writes:
            self._ordered(name, stream, place, self._written.get(place), "writes")
            if self._owner.get(place, stream) != stream and stream not in self._held[place]:
                self.faults.append(f"{name} uses memory of stream {self._owner[place]} on {stream}, which none holds")
        for place in writes:
            for other, (at, what) in self._read.pop(place, {}).items():
                self._ordered(name, stream, place, (other, at, what), "reads")
            self._written[place] = stream, now, name
        for place in reads - writes:
            self._read[place][stream] = now, name
        if waited_for:
            self.waits.append(name)
            _advance(self._host, clock)

    def _ordered(self, name: str, stream: int, place: int, use: tuple[int, int, str] | None, does: str) -> None:
        if use is not None and self._clocks[stream].get(use[0], 0) < use[1]:
            self.faults.append(f"{name} on stream {stream} does not wait for {use[2]} on {use[0]}, which {does} it")


def _advance(clock: Clock, other: Clock) -> None:
    for stream, at in other.items():
        clock[stream] = max(at, clock.get(stream, 0))


class Event:
    """A point in a stream."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock


class Stream(torch.Stream):
    """A stream; the first one is the current one of a program that knows of none."""

    def __new__(cls, device: object = None) -> "Stream":
        _streams.append(made := super().__new__(cls, stream_id=len(_streams), device_index=0, device_type=_TYPE))
        return made

    def record_event(self) -> Event:
        return Event(_timeline.clock(self.stream_id))

    def wait_event(self, event: Event) -> None:
        _timeline.wait(self.stream_id, event.clock)


class _Accelerator:
    """What torch asks of a device's module, and what tangram asks of torch.cuda."""

    Stream = Stream

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing is drawn here but by the CPU's generator."""

    def current_stream(self, device: object = None) -> Stream:
        return _streams[_current[-1]]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        _current.append(stream.stream_id)
        try:
            yield
        finally:
            _current.pop()


_streams: list[Stream] = []
_current = [0]
_timeline = Timeline()
_memory: dict[int, tuple[torch.UntypedStorage, StorageWeakRef]] = {}

MODULE = _Accelerator()
"""What torch.cuda is to a GPU."""

_TYPE = int(torch._C._autograd.DeviceType.PrivateUse1)


@contextmanager
def timeline() -> Iterator[Timeline]:
    """Write down what is done inside, as if nothing were under way."""
    global _timeline
    _timeline = Timeline()
    yield _timeline


def _is_here(tensor: Tensor | torch.UntypedStorage) -> bool:
    return tensor.device.type == "emulated"


def _placed(storage: torch.UntypedStorage, like: Tensor, over: Tensor | None = None) -> Tensor:
    """Return a tensor of the device over a storage of it, laid out as `like` is; the tensor `over` if it is given."""
    tensor = torch._C._acc.create_empty_tensor((0,), like.dtype) if over is None else over
    place = torch.ops.aten.set_.source_Storage_storage_offset
    return place.redispatch(_CPU, tensor, storage, like.storage_offset(), like.size(), like.stride())


def _adopted(tensor: Tensor, over: Tensor | None = None) -> Tensor:
    """Return the device's tensor with the bytes of a CPU's, which no one else has."""
    owner, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
    if not size:
        owner = torch.UntypedStorage(1)  # so that it has an address
    storage = torch._C._construct_storage_from_data_pointer(owner.data_ptr(), torch.device(DEVICE), size)
    _memory[owner.data_ptr()] = owner, StorageWeakRef(storage)
    _timeline.allocate(owner.data_ptr(), _current[-1])
    if len(_memory) % 512 == 0:
        for place in [place for place, (_, user) in _memory.items() if user.expired()]:
            del _memory[place]
    return _placed(storage, tensor, over)


def on_cpu(tensor: Tensor) -> Tensor:
    """Return the CPU's tensor over the bytes of the device's."""
    storage = tensor.untyped_storage()
    if storage.nbytes():
        seen = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    else:
        seen = torch.UntypedStorage(0)
    plain = torch.empty(0, dtype=tensor.dtype).set_(seen, tensor.storage_offset(), tensor.size(), tensor.stride())
    return plain.conj() if tensor.is_conj() else plain


def given_away(tensor: Tensor) -> Tensor:
    """Return the CPU's tensor over the bytes of one that a network reads or writes, after the current stream."""
    if not _is_here(tensor):
        raise RuntimeError(f"a network of {DEVICE} is given a tensor {list(tensor.shape)} on {tensor.device}")
    place = {_place(tensor)}
    _timeline.run("a message", place, place, _current[-1], waited_for=False)
    return on_cpu(tensor)


def _resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    """Give memory up, and what was in it is lost, or take it anew; its place stays the same here."""
    if not _is_here(storage):
        return _resized(storage, size)
    place = storage.data_ptr()
    if size:
        _timeline.allocate(place, _current[-1])
    else:
        torch._C._construct_storage_from_data_pointer(place, torch.device("cpu"), storage.nbytes()).fill_(255)
    return storage


_resized = torch.UntypedStorage.resize_


@cache
def _written_to(op: torch._ops.OpOverload) -> tuple[set[int], set[str], set[int]]:
    """Return which arguments of an operation it writes, by place and by name, and which places want a tensor."""
    arguments = op._schema.arguments
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in arguments]
    places = {place for place, is_written in enumerate(written) if is_written and not arguments[place].kwarg_only}
    names = {argument.name for argument, is_written in zip(arguments, written, strict=True) if is_written}
    return places, names, {place for place, argument in enumerate(arguments) if str(argument.type) == "Tensor"}


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def each_tensor(fn: Callable[[Tensor], object], value: object) -> object:
    """Return a value with `fn` done to every tensor in it."""
    if isinstance(value, Tensor):
        return fn(value)
    return type(value)(each_tensor(fn, part) for part in value) if isinstance(value, list | tuple) else value


def _run(op: torch._ops.OpOverload, *args: object, **kwargs: object) -> object:
    """Do an operation on the bytes of its tensors."""
    places, names, wanted = _written_to(op)
    pairs: list[tuple[Tensor, Tensor]] = []
    reads, writes = set[int](), set[int]()

    def seen(into: set[int]):
        def plain(tensor: Tensor) -> Tensor:
            if _is_here(tensor):
                pairs.append((on_cpu(tensor), tensor))
                into.add(_place(tensor))
                return pairs[-1][0]
            if tensor.ndim:
                raise RuntimeError(f"{op}: a tensor {list(tensor.shape)} on {tensor.device} among those of {DEVICE}")
            return tensor

        return plain

    plain_args = [
        torch.scalar_tensor(arg, dtype=torch.float64 if isinstance(arg, float) else torch.int64)
        if place in wanted and isinstance(arg, int | float)  # a number that was wrapped comes as a number
        else each_tensor(seen(writes if place in places else reads), arg)
        for place, arg in enumerate(args)
    ]
    plain_kwargs = {name: each_tensor(seen(writes if name in names else reads), arg) for name, arg in kwargs.items()}
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{op}: a generator of the CPU draws for {DEVICE}")
    if "device" in kwargs:
        plain_kwargs["device"] = torch.device("cpu")

    def back(tensor: Tensor) -> Tensor:
        for plain, own in pairs:
            if plain is tensor:
                return own if plain.size() == own.size() else _adopted(plain, own)
        for plain, own in pairs:
            if tensor.numel() and _place(plain) == _place(tensor):
                return _placed(own.untyped_storage(), tensor)
        return _adopted(tensor)

    found = op(*plain_args, **plain_kwargs)
    result = each_tensor(back, found)
    each_tensor(lambda tensor: writes.add(_place(tensor)), result)
    read = op._schema.name in _READ
    _timeline.run(op._schema.name, reads, writes, _current[-1], waited_for=read)
    return result


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy, also between the device and the CPU, for which the host waits."""
    here = [_is_here(tensor) for tensor in (source, target)]
    plain, into = (on_cpu(tensor) if own else tensor for tensor, own in zip((source, target), here, strict=True))
    into.copy_(plain)
    reads, writes = ({_place(tensor)} if own else set() for tensor, own in zip((source, target), here, strict=True))
    _timeline.run("aten::copy_", reads, writes, _current[-1], waited_for=not all(here))
    return target


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Tensor:
    return _adopted(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None) -> Tensor:
    return _adopted(torch.empty_strided(size, stride, dtype=dtype))


def _made_as_large(tensor: Tensor, size: list[int], *, memory_format=None) -> Tensor:
    plain, larger = on_cpu(tensor).flatten(), torch.empty(size, dtype=tensor.dtype)
    kept = min(plain.numel(), larger.numel())
    larger.view(-1)[:kept] = plain[:kept]
    return _adopted(larger, tensor)


def _record_stream(tensor: Tensor, stream: torch.Stream) -> None:
    _timeline.hold(_place(tensor), stream.stream_id)


def _as_it_is(op: torch._ops.OpOverload):
    """Return what lays out the same storage otherwise, which the CPU's operation does on any device."""
    return lambda *args: op.redispatch(_CPU, *args)


_libraries: list[torch.library.Library] = []


def set_up() -> None:
    """Make the device known to torch, for the rest of this process: before its first backward."""
    _setup_privateuseone_for_python_backend("emulated", MODULE)
    Stream()
    every, own = (torch.library.Library(name, "IMPL", "PrivateUse1") for name in ("_", "aten"))
    _libraries.extend((every, own))
    every.fallback(_run, "PrivateUse1")
    for name in ("as_strided", "view", "_reshape_alias", "unfold"):
        own.impl(name, _as_it_is(getattr(torch.ops.aten, name).default))
    own.impl("empty.memory_format", _empty)
    own.impl("empty_strided", _empty_strided)
    own.impl("record_stream", _record_stream)
    own.impl("resize_", _made_as_large)
    own.impl("_copy_from", _copy)
    for key in ("Conjugate", "Negative"):  # or copying a conjugate would copy it first
        _libraries.append(torch.library.Library("aten", "IMPL", key))
        _libraries[-1].impl("_copy_from", torch.library.fallthrough_kernel, key)
    torch.UntypedStorage.resize_ = _resize


def apart(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process of its own that has the device.

    A process that has one cannot let go of it: torch compiles for it, and forks no more once it went backward there.
    """

    @wraps(test)
    def run(**arguments: object) -> None:
        run_ranks(_called, 1, getfile(test), test.__name__, arguments)

    return run


def _called(rank: int, file: str, name: str, arguments: dict[str, object]) -> None:
    set_up()
    spec = spec_from_file_location(Path(file).stem, file)
    spec.loader.exec_module(module := module_from_spec(spec))
    getattr(module, name).__wrapped__(**arguments)

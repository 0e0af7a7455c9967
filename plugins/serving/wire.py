"""What the front and its workers say to each other over a socket of this machine: JSON, and tensors in safetensors.

A frame is the sizes of its two parts and the parts: a JSON object, whose `what` says what it is about, and bytes.
"""

import asyncio
import json
import socket
import struct
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from attrs import asdict

if TYPE_CHECKING:
    from tangram.core.decoding import Packet

Head: TypeAlias = dict[str, Any]
"""The JSON of a frame: its border is not typed."""

_SIZES = struct.Struct(">IQ")


def frame(head: Head, body: bytes = b"") -> bytes:
    """Return a frame as it is sent."""
    text = json.dumps(head).encode()
    return _SIZES.pack(len(text), len(body)) + text + body


async def read_frame(reader: asyncio.StreamReader) -> tuple[Head, bytes]:
    """Return the next frame.

    Raises:
        EOFError: The other side is gone.
    """
    head, body = _SIZES.unpack(await reader.readexactly(_SIZES.size))  # IncompleteReadError is an EOFError
    return json.loads(await reader.readexactly(head)), await reader.readexactly(body)


class Line:
    """A worker's end of the socket, which it reads between its rounds."""

    def __init__(self, end: socket.socket) -> None:
        self._end, self._bytes = end, bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def send(self, head: Head, body: bytes = b"") -> None:
        """Send a frame.

        Raises:
            OSError: The front is gone.
        """
        self._end.settimeout(None)
        self._end.sendall(frame(head, body))

    def heard(self, *, wait: bool) -> list[tuple[Head, bytes]]:
        """Return the frames that are there whole; with `wait`, at least one.

        Raises:
            EOFError: The front is gone.
        """
        frames = self._whole()
        while True:
            self._end.settimeout(None if wait and not frames else 0.0)
            try:
                more = self._end.recv(1 << 20)
            except BlockingIOError:
                return frames
            if not more:
                raise EOFError("the front is gone")
            self._bytes += more
            frames += self._whole()

    def _whole(self) -> list[tuple[Head, bytes]]:
        found = []
        while len(self._bytes) >= _SIZES.size:
            head, body = _SIZES.unpack_from(self._bytes)
            first, stop = _SIZES.size + head, _SIZES.size + head + body
            if len(self._bytes) < stop:
                break
            found.append((json.loads(self._bytes[_SIZES.size : first]), bytes(self._bytes[first:stop])))
            del self._bytes[:stop]
        return found


def packed(packet: "Packet") -> tuple[Head, bytes]:
    """Return a sequence that is handed over as the parts of a frame."""
    from safetensors.torch import save

    one = packet.running
    tensors = {f"trunk.{i}": kept for i, kept in enumerate(packet.trunk)}
    tensors |= {f"module.{i}": kept for i, kept in enumerate(packet.modules)}
    tensors |= {f"guess.{i}": guess for i, guess in enumerate(one.guesses)}
    tensors |= {f"carried.{k}": hidden for k, hidden in one.carried.items()}
    head = {"tokens": one.tokens, "sampling": asdict(one.sampling), "draws": one.draws, "drafts": one.drafts}
    return head, save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})


def unpacked(head: Head, body: bytes) -> "Packet":
    """Return the sequence that `packed` made these parts of."""
    from safetensors.torch import load

    from tangram.core.decoding import Packet
    from tangram.core.sampling import Sampling
    from tangram.core.speculation import Running

    tensors = load(body)
    kinds: dict[str, dict[int, Any]] = {"trunk": {}, "module": {}, "guess": {}, "carried": {}}
    for name, tensor in tensors.items():
        kind, _, number = name.partition(".")
        kinds[kind][int(number)] = tensor
    trunk, modules, guesses = ([kinds[kind][i] for i in sorted(kinds[kind])] for kind in ("trunk", "module", "guess"))
    running = Running(
        head["tokens"], Sampling(**head["sampling"]), head["draws"], head["drafts"], guesses, kinds["carried"]
    )
    return Packet(running, tuple(trunk), tuple(modules))

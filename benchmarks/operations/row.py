"""A case measured: whether it is right, how long it takes, and how long its peers take."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch

from operations.case import Case, Function, Peer, as_tuple, distance
from operations.clock import Ceilings, Clock

FAR = 0.1
"""Relative distance beyond which a peer computes something else: two products in FP8 are 0.05 apart."""

EAGER, COMPILED = "torch eager", "torch.compile"


class Refusal(NamedTuple):
    """Why a peer is not timed.

    Attributes:
        word: What is printed in its place.
        reason: What it said.
    """

    word: str
    reason: str


@dataclass(frozen=True)
class Row:
    """What came of a case.

    Attributes:
        title: Of its table.
        operation: Its name.
        shape: Its sizes.
        fault: What is wrong with its results; then nothing was timed.
        seconds: Median time of a call.
        moved: Bytes that it must at least read and write.
        flops: Operations of its matrix products.
        share: The least time that the ceilings leave, over `seconds`.
        ceiling: Which of them is the nearer.
        peers: Median time of each peer, or the word in its place.
        reasons: What those said that were not timed.
    """

    title: str
    operation: str
    shape: str
    fault: str | None = None
    seconds: float = 0.0
    moved: int = 0
    flops: float = 0.0
    share: float = 0.0
    ceiling: str = ""
    peers: dict[str, float | str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def measured(title: str, case: Case, clock: Clock, ceilings: Ceilings, compile: str | None) -> Row:
    """Check a case and, if it is right, time it beside its peers.

    Args:
        title: Of its table.
        case: The case.
        clock: What times it.
        ceilings: What its time is held against.
        compile: Why nothing is compiled; None if `torch.compile` is a peer.
    """
    try:
        results = case.bound(case.ours)()
        wanted = case.expected()
        case.check(results, wanted)
    except Exception as fault:  # the others are measured all the same
        return Row(title, case.operation, case.shape, f"{type(fault).__name__}: {fault}")
    sides: dict[str, Callable[[], object]] = {"ours": case.bound(case.ours)}
    tried = {name: _tried(case, peer, wanted) for name, peer in _peers(case, compile).items()}
    sides |= {name: call for name, call in tried.items() if not isinstance(call, Refusal)}
    moved = _bytes((*case.inputs, *case.arriving, *results))
    del results, wanted
    took = clock.seconds(sides)
    share, ceiling = ceilings.share(took["ours"], moved, case.flops)
    return Row(
        title=title,
        operation=case.operation,
        shape=case.shape,
        seconds=took["ours"],
        moved=moved,
        flops=case.flops,
        share=share,
        ceiling=ceiling,
        peers={name: call.word if isinstance(call, Refusal) else took[name] for name, call in tried.items()},
        reasons={name: call.reason for name, call in tried.items() if isinstance(call, Refusal)},
    )


def forget() -> None:
    """Let go of what the last case held, and of what was compiled for it: a formula is compiled anew for each."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peers(case: Case, compile: str | None) -> dict[str, Peer | Refusal]:
    """Return the peers of a case, those for all cases first."""
    peers: dict[str, Peer | Refusal] = {EAGER: Peer(lambda: case.formula)}
    if case.fuses:
        peers[COMPILED] = Refusal(compile, "") if compile else Peer(lambda: _compiled(case))
    return {**peers, **case.peers}


def _compiled(case: Case) -> Function:
    functorch.donated_buffer = False  # or a graph could be gone through backwards once only
    return case.compiled(torch.compile) if case.compiled else torch.compile(case.formula)


def _tried(case: Case, peer: Peer | Refusal, wanted: tuple[Tensor, ...]) -> Callable[[], object] | Refusal:
    """Return a peer's call if it gives about what is wanted."""
    if isinstance(peer, Refusal):
        return peer
    try:
        call = case.bound(peer.make())
        results = call()
    except ImportError as error:
        return Refusal("absent", str(error))
    except Exception as error:  # whatever a library raises that does not do this here
        return Refusal("unsupported", f"{type(error).__name__}: {error}")
    results = as_tuple(peer.seen(results[0])) if len(results) == 1 else results
    if [t.shape for t in results] != [t.shape for t in wanted]:
        return Refusal("differs", f"shapes {[list(t.shape) for t in results]}")
    far = max(distance(one, other) for one, other in zip(results, wanted, strict=True))
    return call if far <= FAR else Refusal("differs", f"relative distance {far:.2g}")


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

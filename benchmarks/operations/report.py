"""Rows as tables: on the console, and in Markdown and JSON files."""

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from operations.clock import Ceilings
from operations.row import Row
from tangram.kernels import paths

PACKAGES = ("torch", "triton", "transformers", "torchao", "liger-kernel")
WRONG = "WRONG"
BUSY = 0.5
"""Load from which other work is said to have run."""


class Report:
    """What a run found.

    Args:
        device: Where the operations ran.
        ceilings: Of the machine.
        command: What was typed.
        timing: How times were taken.
        load: Processes that ran or waited in the minute before.
    """

    def __init__(self, device: str, ceilings: Ceilings, command: str, timing: str, load: float) -> None:
        self._unit = (1e9, "G") if device == "cpu" else (1e12, "T")
        self._ceilings = ceilings
        ran = "Other work ran" if load >= BUSY else "Nothing else ran"
        self.first = f"{ran} on this machine: a load of {load:.1f} on {os.cpu_count()} cores before the run."
        self.facts = {
            "machine": _machine(device),
            "versions": ", ".join(f"{name} {_version(name)}" for name in ("python", *PACKAGES)),
            "operations": paths()[device],
            "command": command,
            "times": timing,
            "ceilings": f"copy {self._rate(ceilings.copied)} {self._unit[1]}B/s, product of square matrices "
            f"{self._rate(ceilings.multiplied)} {self._unit[1]}FLOP/s",
        }

    def show(self, rows: Sequence[Row]) -> None:
        """Print what the figures depend on, the tables, and what is wrong."""
        console = Console(width=200)
        console.print(self.first, *(f"{name}: {fact}" for name, fact in self.facts.items()), sep="\n", highlight=False)
        for title, columns, lines in self._tables(rows):
            table = Table(title=title, title_justify="left")
            for place, column in enumerate(columns):
                table.add_column(column, justify="left" if place < 2 else "right", no_wrap=place < 2)
            for line in lines:
                table.add_row(*line)
            console.print(table)
        for row in rows:
            if row.fault is not None:
                console.print(f"{WRONG}: {row.operation}, {row.shape}: {row.fault}", style="red", highlight=False)

    def write(self, rows: Sequence[Row], folder: Path) -> None:
        """Write kernels.md and kernels.json."""
        folder.mkdir(parents=True, exist_ok=True)
        text = [self.first, "", *(f"* {name}: {fact}" for name, fact in self.facts.items()), "", *_MEANING, ""]
        for title, columns, lines in self._tables(rows):
            text += [f"## {title}", "", _line(columns), _line(["---"] * 2 + ["---:"] * (len(columns) - 2))]
            text += [*map(_line, lines), ""]
        (folder / "kernels.md").write_text("\n".join(text))
        content = {
            "load": self.first,
            **self.facts,
            "copied_bytes_per_second": self._ceilings.copied,
            "multiplied_flops_per_second": self._ceilings.multiplied,
            "rows": [asdict(row) for row in rows],
        }
        (folder / "kernels.json").write_text(json.dumps(content, indent=1) + "\n")

    def _tables(self, rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        for title, part in groupby(rows, lambda row: row.title):
            group = list(part)
            peers = list(dict.fromkeys(name for row in group for name in row.peers))
            letter = self._unit[1]
            columns = ["operation", "shape", "ms", f"{letter}B/s", f"{letter}FLOP/s", "of ceiling", *peers]
            yield title, columns, [self._cells(row, peers) for row in group]

    def _cells(self, row: Row, peers: list[str]) -> list[str]:
        if row.fault is not None:
            return [row.operation, row.shape, WRONG, *[""] * (3 + len(peers))]
        flops = self._rate(row.flops / row.seconds) if row.flops else ""
        moved = self._rate(row.moved / row.seconds)
        share = f"{row.share:.0%} {row.ceiling}"
        ratios = [_ratio(row.peers.get(name, ""), row.seconds) for name in peers]
        return [row.operation, row.shape, f"{1000 * row.seconds:.3g}", moved, flops, share, *ratios]

    def _rate(self, a_second: float) -> str:
        return f"{a_second / self._unit[0]:.3g}"


_MEANING = (
    "The last columns are the time of a peer over ours: above 1 ours is faster. Before anything was timed every result",
    "was compared with its formula in float64, or, where it is quantised, bit by bit with the formula itself. What is",
    "`of ceiling` is the least time that a copy of as many bytes or a product of as many operations would take,",
    "whichever is longer, over the time taken. On a CPU what works in place, or in the cache, may beat the",
    "copy, which also reads the lines that it writes.",
)


def _ratio(peer: float | str, ours: float) -> str:
    return peer if isinstance(peer, str) else f"{peer / ours:.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}, one thread"


def _version(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"

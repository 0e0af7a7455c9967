"""Every operation of `tangram.kernels` that has a Triton kernel: right or not, how fast, and against whom.

    python benchmarks/kernels.py [--out DIR] [--only NAME] [--no-compile] [--budget 0.3]

On a GPU the kernels run at DeepSeek-V3's shapes, on a CPU their twins at smaller ones, at one thread. An operation is
first compared with its formula, with the tolerances of its tests; one that is wrong prints WRONG and no figure, and
the command ends with exit code 1. Then come medians, rates, the share of what a copy and a product of square matrices
reach in the same run, and the time of every peer over ours: plain torch, the same compiled, what torch, `torchao`,
`transformers` and Liger have for it. A peer that is not installed is `absent`, one that refuses this device or shape
`unsupported`, one whose result is another `differs`; what it said is in the JSON file.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch
from operations import cases
from operations.clock import Clock, CPUClock, GPUClock, ceilings
from operations.report import Report
from operations.row import Row, forget, measured
from operations.scale import SMALL, V3
from rich.console import Console

from tangram.core.process import settle
from tangram.kernels.compiled import compiler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for kernels.md and kernels.json")
    parser.add_argument("--only", default="", help="part of an operation's name")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--budget", type=float, default=0.3, help="CPU seconds of a case's timing")
    wanted = parser.parse_args()
    load = os.getloadavg()[0]
    scale = V3 if torch.cuda.is_available() else SMALL
    clock: Clock = GPUClock() if scale.device == "cuda" else CPUClock(wanted.budget)
    if scale.device == "cpu":
        settle()  # as every training process does
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    compile = "not asked for" if wanted.no_compile else None
    if compile is None and scale.device == "cpu" and compiler() is None:
        compile = "no compiler"
    command = shlex.join(["python", "benchmarks/kernels.py", *sys.argv[1:]])
    limits = ceilings(clock, scale.device, scale.dtype)
    report = Report(scale.device, limits, command, clock.said, load)
    rows: list[Row] = []
    with Console(stderr=True).status("") as status:
        for title, case in cases(scale, wanted.only):
            status.update(f"{case.operation}, {case.shape}")
            rows.append(measured(title, case, clock, limits, compile))
            if wanted.out is not None:
                report.write(rows, wanted.out)  # after each, or a run that is cut off would leave nothing
            del case
            forget()
    if not rows:
        parser.error(f"no operation's name has {wanted.only!r} in it")
    report.show(rows)
    if any(row.fault is not None for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

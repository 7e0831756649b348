"""Time of `import lowrank_lab` after `import torch`, in alternating fresh processes.

The floor is the import of what the library needs: pydantic, which checks configurations, and numpy.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

from benchmarks.harness import Row

LIMIT = 0.3  # seconds
PROGRAMS = {"ours": "import lowrank_lab", "floor": "import numpy; from pydantic import BaseModel"}
CLOCK = """
import time
started = time.perf_counter()
import torch
between = time.perf_counter()
{program}
print(between - started, time.perf_counter() - between)
"""


def rows(quick: bool = False) -> list[Row]:
    """One row: medians over the rounds of the seconds after torch has been imported."""
    turns = [{n: run(p) for n, p in PROGRAMS.items()} for _ in range(1 if quick else 9)]
    torch_alone = median(turn["ours"][0] for turn in turns)
    ours, floor = (median(turn[name][1] for turn in turns) for name in ("ours", "floor"))
    return [
        Row(
            "import lowrank_lab beyond torch", ours, None, floor, "s", ours,
            f"≤ {LIMIT:g}", note=f"import torch alone: {torch_alone:.2f} s",
        )
    ]  # fmt: skip


def run(program: str) -> tuple[float, float]:
    """Seconds of `import torch` and of the program after it, in a process of its own."""
    command = [sys.executable, "-c", CLOCK.format(program=program)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    first, second = map(float, printed.split())
    return first, second

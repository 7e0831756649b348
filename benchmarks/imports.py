"""`import lowrank_lab` beyond `import torch`, in alternating fresh processes.

The floor is what the library can't do without: pydantic, which checks configurations, and numpy.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.harness import Row, median, take_turns

LIMIT = 0.3  # seconds
PROGRAMS = {
    "torch": "import torch",
    "floor": "import torch, numpy; from pydantic import BaseModel",
    "ours": "import torch, lowrank_lab",
}


def rows(quick: bool = False) -> list[Row]:
    """One row: medians over the rounds of the seconds beyond a process that imports torch."""
    contestants = {name: partial(run, program) for name, program in PROGRAMS.items()}
    seconds = take_turns(contestants, 1 if quick else 9)

    def beyond(name: str) -> float:
        return median([a - b for a, b in zip(seconds[name], seconds["torch"], strict=True)])

    ours = beyond("ours")
    return [
        Row(
            "import lowrank_lab beyond torch", ours, None, beyond("floor"), "s", ours,
            f"≤ {LIMIT:g}", note=f"import torch alone: {median(seconds['torch']):.2f} s",
        )
    ]  # fmt: skip


def run(program: str) -> None:
    """Run a Python program in a process of its own."""
    subprocess.run([sys.executable, "-c", program], check=True)

"""What `import lowrank_lab` takes beyond `import torch`, in fresh processes."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.harness import Row, median, take_turns


def rows(quick: bool = False) -> list[Row]:
    def importing(names: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {names}"], check=True)

    words = {"ours": "torch, lowrank_lab", "peer": "torch", "floor": "torch, pydantic, numpy"}
    contestants = {name: lambda names=names: importing(names) for name, names in words.items()}
    found = take_turns(contestants, 1 if quick else 9)
    seconds = {name: median(values) for name, values in found.items()}
    beyond = [a - b for a, b in zip(found["ours"], found["peer"], strict=True)]
    return [
        Row(
            "import lowrank_lab", seconds["ours"], seconds["peer"], seconds["floor"], "s",
            median(beyond), "≤ 0.3", "import torch", "ratio: seconds beyond torch",
        )
    ]  # fmt: skip

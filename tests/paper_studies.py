"""The heads of notebooks/studies/paper_*.yaml, and what they are compared with."""

import re
import shlex

from paths import NOTEBOOKS

from lowrank_lab.studies.plan import plan_study
from lowrank_lab.studies.progress import plan_facts

# rank and tokens of each size, as published
PUBLISHED = {"60m": (128, 1.1e9), "130m": (256, 2.2e9), "350m": (256, 6.4e9), "1b": (512, 13.1e9)}
ROW = r"(.+), seed 0 +([\d.]+) GB +([\d.]+) GB +([\d.]+) +([\d.]+) +([\d.]+) GB"
COLUMNS = ("weights_and_states_bytes", "device_memory_bytes", "flops", "hours", "disk_bytes")
UNITS = dict(zip(COLUMNS, (1e9, 1e9, 1e18, 1, 1e9), strict=True))


def path_of(size):
    return NOTEBOOKS / "studies" / f"paper_{size}.yaml"


def head_of(size):
    """The comment that a file begins with, without its signs."""
    lines = path_of(size).read_text().splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line[1:].strip() for line in lines[:count])


def command_in(head, start):
    """The words of a command that a head gives, after its name."""
    (found,) = re.findall(rf"{start} (.+?)(?:`|\n\n|$)", head.replace("\\\n", ""), re.S)
    return shlex.split(found)


def agrees(shown, value):
    """Whether a value, rounded to the digits shown, is what is shown; give or take the last."""
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 1.01 * 10**-digits


def facts_of(size):
    """What the command in a head prints, as facts."""
    words = command_in(head_of(size), f"study notebooks/studies/paper_{size}.yaml --dry-run")
    assert words[0] == "--flops"
    return plan_facts(plan_study(path_of(size), elsewhere=True), float(words[1]))


def assert_head_says(size, facts, columns):
    head = head_of(size)
    rows = {label: values for label, *values in re.findall(rf"^{ROW}$", head, re.M)}
    runs = {run["label"].removesuffix(", seed 0"): run for run in facts["runs"]}
    assert list(rows) == list(runs)
    for label, run in runs.items():
        shown = dict(zip(COLUMNS, rows[label], strict=True))
        wrong = {
            name: (shown[name], run[name] / UNITS[name])
            for name in columns
            if not agrees(shown[name], run[name] / UNITS[name])
        }
        assert not wrong, f"{label}: {wrong}; write into the head what its command prints"
    ((count, hours, disk),) = re.findall(r"^(\d+) runs, ([\d.]+) hours, ([\d.]+) GB", head, re.M)
    assert int(count) == len(runs)
    assert agrees(hours, sum(run["hours"] for run in runs.values()))
    assert agrees(disk, sum(run["disk_bytes"] for run in runs.values()) / 1e9)

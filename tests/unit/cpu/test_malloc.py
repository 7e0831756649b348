"""Memory that a training process frees: kept for the next step, given back at the end."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from lowrank_lab.cpu import malloc

glibc = pytest.mark.skipif(malloc._glibc() is None, reason="the C library isn't glibc")

# Pages that the system had to find while blocks of 64 MB came and went, and MiB held afterwards.
PROGRAM = """
import json, resource
from contextlib import nullcontext
import torch
from lowrank_lab.cpu.malloc import keep_freed_memory
torch.set_num_threads(1)
def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20
def faults(block):
    before = held()
    with block:
        for _ in range(12):  # until blocks have their places: where the first lie is chance
            torch.zeros(1 << 24) + 1
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.zeros(1 << 24) + 1
        count = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
        during = held() - before
    return count, during, held() - before
faults(nullcontext())
print(json.dumps([faults(nullcontext()), faults(keep_freed_memory()), faults(nullcontext())]))
"""


@cache
def measured(**environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
        env={**{k: v for k, v in os.environ.items() if k not in malloc.SETTINGS}, **environment},
    )  # fmt: skip
    return [
        dict(zip(("faults", "during", "after"), x, strict=True)) for x in json.loads(done.stdout)
    ]


@glibc
def test_steps_find_the_memory_that_the_last_one_freed():
    before, inside, _ = measured()
    assert inside["faults"] < before["faults"] / 20


@glibc
def test_memory_goes_back_to_the_system_at_the_end():
    _, inside, _ = measured()
    assert inside["during"] > 100
    assert inside["after"] < 20


@glibc
def test_what_the_environment_says_about_malloc_stays():
    _, inside, _ = measured(MALLOC_MMAP_THRESHOLD_="1000000")
    assert inside["during"] < 20


def test_without_glibc_nothing_happens(monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown)
    with malloc.keep_freed_memory():
        assert malloc._glibc() is None


def test_an_error_in_the_block_comes_through():
    with pytest.raises(KeyError), malloc.keep_freed_memory():
        raise KeyError

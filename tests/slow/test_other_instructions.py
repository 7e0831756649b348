"""The compiled kernels with fewer instructions than this CPU has: their equations once more."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from lowrank_lab.kernels import operators as kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
FILES = ("kernels/test_halves.py", "kernels/test_kernels.py", "cpu/test_products.py")
EQUATIONS = "formula or float64 or threads or scratch or losses"  # in the names of tests


def test_kernels_with_the_tiles_of_AVX2_are_their_equations():
    files = [str(ROOT / "tests/unit" / file) for file in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files, "-k", EQUATIONS],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout

"""The equations of the kernels, with fewer instructions than this CPU has, by another compiler."""

import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

from lowrank_lab.kernels import operators as kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
FILES = ("kernels/test_halves.py", "kernels/test_kernels.py", "cpu/test_products.py")
EQUATIONS = "formula or float64 or threads or scratch or losses"  # in the names of tests


@pytest.mark.parametrize(
    ("name", "value"), [("ATEN_CPU_CAPABILITY", "avx2"), ("CXX", "clang++")], ids=["AVX2", "clang"]
)
def test_kernels_built_otherwise_are_their_equations(name, value):
    if name == "CXX" and not shutil.which(value):
        pytest.skip("no clang")
    files = [str(ROOT / "tests/unit" / file) for file in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files, "-k", EQUATIONS],
        env={**os.environ, name: value},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout

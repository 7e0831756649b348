"""The compiled kernels: built by the machine's C++ compiler at their first use, then cached."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = ("attention.cpp", "pointwise.cpp", "products.cpp")
_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
ARGUMENTS = {  # of each function; the number of threads is the last
    "attention_forward": [*8 * [_pointer], *4 * [_long], _pointer, _int],
    "attention_backward": [*12 * [_pointer], *4 * [_long], _pointer, _int],
    "norm_forward": [*4 * [_pointer], *2 * [_long], _float, _int],
    "norm_backward": [*6 * [_pointer], *2 * [_long], _int],
    "swiglu_forward": [*3 * [_pointer], _long, _int],
    "swiglu_backward": [*5 * [_pointer], _long, _int],
    "losses": [*3 * [_pointer], *2 * [_long], _int, _int],
    "product": [
        _pointer, _long, _long, _pointer, _long, _long, _pointer, _pointer, *3 * [_long], _int,
    ],
}  # fmt: skip
SWITCH = "LOWRANK_LAB_KERNELS"  # environment variable: 0 leaves the kernels to torch
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math",
)  # fmt: skip
# What torch was told to use of the CPU (ATEN_CPU_CAPABILITY) holds here, too.
INSTRUCTIONS = {"AVX2": "-march=x86-64-v3", "DEFAULT": "-march=x86-64"}
SECONDS = 120  # for the compiler


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None without a C++ compiler, or where torch's own are asked for (`SWITCH`)."""
    compiler = _compiler()
    if compiler is None or os.environ.get(SWITCH) == "0":
        return None
    for flags in (("-fopenmp",), ()):  # Apple's compiler has no OpenMP
        try:
            return _loaded(compiler, [*FLAGS, _instructions(), *flags])
        except (OSError, AttributeError, subprocess.SubprocessError):
            continue
    return None


def _compiler() -> str | None:
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _instructions() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() in ("x86_64", "AMD64"):
        return INSTRUCTIONS.get(capability, "-march=native")
    return "-mcpu=native"


def _loaded(compiler: str, flags: list[str]) -> ctypes.CDLL:
    """The library, compiled if the cache doesn't have it.

    Its name is a hash of the source, the compiler and its flags, and the CPU's abilities: one home
    folder may serve several machines.
    """
    digest = hashlib.sha256(repr((compiler, flags, _abilities())).encode())
    for file in sorted((*HERE.glob("*.cpp"), *HERE.glob("*.h"))):
        digest.update(file.read_bytes())
    folder, name = _cache_folder(), f"kernels-{digest.hexdigest()[:24]}.so"
    if folder is not None and (folder / name).exists():
        return _typed(folder / name)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / name
        command = [compiler, *flags, *(str(HERE / source) for source in SOURCES), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        found = _typed(made)  # stays loaded when its file moves or goes
        if folder is not None:
            made.replace(folder / name)  # at once: another process may do the same
        return found


def _abilities() -> list[tuple[str, object]]:
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return sorted({**found, "machine": platform.machine(), "node": platform.system()}.items())


def _cache_folder() -> Path | None:
    """The user's cache folder of this library; None if it can't be written."""
    with contextlib.suppress(OSError, RuntimeError):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "lowrank-lab"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None


def _typed(file: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(file))
    for name, arguments in ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
    return found

"""The compiled kernels: built by the machine's C++ compiler at their first use, then cached."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

LOG = logging.getLogger(__name__)
HERE = Path(__file__).parent
SOURCES = (
    "attention.cpp", "head.cpp", "mlp.cpp", "pointwise.cpp", "products.cpp", "self_attention.cpp",
)  # fmt: skip
_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
ARGUMENTS = {  # of each function; the number of threads is the last
    "attention_forward": [*8 * [_pointer], *4 * [_long], _pointer, _int],
    "attention_forward_bf16": [*8 * [_pointer], *4 * [_long], _pointer, _int],
    "attention_backward": [*11 * [_pointer], *4 * [_long], _pointer, _int],
    "attention_backward_bf16": [*11 * [_pointer], *4 * [_long], _pointer, _int],
    "norm_forward": [*4 * [_pointer], *2 * [_long], _float, _int],
    "norm_backward": [*6 * [_pointer], *3 * [_long], _int],
    "swiglu_forward": [*3 * [_pointer], _long, _int],
    "swiglu_backward": [*5 * [_pointer], _long, _int],
    "mlp_forward": [*10 * [_pointer], *3 * [_long], _float, _int],
    "mlp_backward": [*15 * [_pointer], *3 * [_long], _int],
    "self_attention_forward": [*16 * [_pointer], *4 * [_long], _float, _int],
    "self_attention_backward": [*22 * [_pointer], *4 * [_long], _int],
    "head_losses": [*7 * [_pointer], *3 * [_long], _int, _int],
    "losses": [*3 * [_pointer], *2 * [_long], _int, _int],
    "product": [
        _pointer, _long, _long, _pointer, _long, _long, _pointer, _pointer, *3 * [_long], _int,
    ],
}  # fmt: skip
SCRATCH = {  # of each function that returns a number of floats
    "attention_forward_scratch": [*3 * [_long], _int, _int],
    "attention_backward_scratch": [*3 * [_long], _int, _int],
    "mlp_scratch": [_long, _long, _long, _int, _int],
    "self_attention_scratch": [*4 * [_long], _int, _int],
    "head_scratch": [_long, _long, _long, _int, _int],
    "product_scratch": [_long, _long, _int],
}
SWITCH = "LOWRANK_LAB_KERNELS"  # environment variable: 0 leaves the kernels to torch
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math",
)  # fmt: skip
# ATEN_CPU_CAPABILITY, which restricts torch's instructions, restricts these too.
INSTRUCTIONS = {"AVX2": "-march=x86-64-v3", "DEFAULT": "-march=x86-64"}
# For a torch that can't list the CPU's abilities, by which the cache tells CPUs apart.
OLD_INSTRUCTIONS = {"AVX512": "-march=x86-64-v4"}
SECONDS = 120  # for the compiler
ABANDONED = 10 * SECONDS  # age of a folder that no compilation uses any more
KEPT = 12  # libraries in the cache: several versions, for several CPUs that share a home folder
BUILDING = "building-"  # of temporary folders in the cache


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None without a C++ compiler, or where torch's own are asked for (`SWITCH`).

    A compiler that fails is reported once, in one line of the log.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    failed = []
    for compiler in _compilers():
        for flags in (("-fopenmp",), ()):  # Apple's compiler has no OpenMP
            try:
                return _loaded(compiler, [*FLAGS, _instructions(), *flags])
            except (OSError, AttributeError, subprocess.SubprocessError) as error:
                why = f"{' '.join(compiler)} failed ({_reason(error)})"
        failed.append(why)
    if failed:
        LOG.warning(
            "kernels: %s; torch's operators compute instead, more slowly (%s=0: no try)",
            ", ".join(failed), SWITCH,
        )  # fmt: skip
    return None


def _compilers() -> list[list[str]]:
    """The commands of the compilers to try: CXX, or the usual ones that exist."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and shutil.which(named[0]):
        return [named]
    if named:
        LOG.warning("kernels: CXX: %s is not found; the usual compilers are tried", named[0])
    return [[path] for name in ("g++", "clang++", "c++") if (path := shutil.which(name))]


def _reason(error: Exception) -> str:
    """The first error that the compiler reports, or what else went wrong."""
    printed = (getattr(error, "stderr", None) or b"").decode(errors="replace").splitlines()
    first = next((line for line in printed if "error" in line.lower()), str(error))
    return " ".join(first.split())[:200]


def _instructions() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() in ("x86_64", "AMD64"):
        known = (
            INSTRUCTIONS
            if hasattr(torch.cpu, "get_capabilities")
            else INSTRUCTIONS | OLD_INSTRUCTIONS
        )
        return known.get(capability, "-march=native")
    return "-mcpu=native"


def _loaded(compiler: list[str], flags: list[str]) -> ctypes.CDLL:
    """The library, compiled if the cache doesn't have it.

    Its name has a hash of the source, the compiler and its flags, and the CPU's abilities, as one
    home folder may serve several machines; and another one of what is in the file.
    """
    origin = [repr((compiler, flags, _abilities())).encode()]
    origin += [file.read_bytes() for file in sorted((*HERE.glob("*.cpp"), *HERE.glob("*.h")))]
    folder, stem = _cache_folder(), f"kernels-{_digest(*origin)}"
    if folder is not None and (found := _cached(folder, stem)) is not None:
        return found
    if folder is not None and not os.access(folder, os.W_OK):
        folder = None
    if folder is not None:
        _clean(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=BUILDING) as scratch:
        made = Path(scratch) / f"{stem}.so"
        command = [*compiler, *flags, *(str(HERE / source) for source in SOURCES), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        found = _typed(made)  # stays loaded when its file moves or goes
        if folder is not None:  # at once: another process may do the same
            made.replace(folder / f"{stem}-{_digest(made.read_bytes())}.so")
        return found


def _cached(folder: Path, stem: str) -> ctypes.CDLL | None:
    """A library of that origin in the cache; None if there is no whole one that can be loaded.

    Loading a library whose end is missing, as after a power cut, would end the process.
    """
    for file in sorted(folder.glob(f"{stem}-*.so")):
        with contextlib.suppress(OSError, AttributeError):
            if file.stem == f"{stem}-{_digest(file.read_bytes())}":
                found = _typed(file)
                with contextlib.suppress(OSError):
                    os.utime(file)  # its last use
                return found
    return None


def _clean(folder: Path) -> None:
    """Remove what killed compilations have left, and all but the `KEPT` libraries used last.

    Others may compile or load at the same time: a compilation takes less than `ABANDONED` seconds,
    a library stays loaded without its file, and one that is missed is compiled again.
    """
    for left in (*folder.glob(f"{BUILDING}*"), *folder.glob("tmp*")):
        if left.is_dir() and time.time() - _last_use(left) > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    for file in sorted(folder.glob("kernels-*.so"), key=_last_use, reverse=True)[KEPT - 1 :]:
        with contextlib.suppress(OSError):
            file.unlink()


def _last_use(path: Path) -> float:
    """Its time of modification; 0 if another process has just removed it."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:24]


def _abilities() -> list[tuple[str, object]]:
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return sorted({**found, "machine": platform.machine(), "node": platform.system()}.items())


def _cache_folder() -> Path | None:
    """The user's cache folder of this library; None if there is none and it can't be made."""
    with contextlib.suppress(OSError, RuntimeError):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "lowrank-lab"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return None


def _typed(file: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(file))
    for name, arguments in (ARGUMENTS | SCRATCH).items():
        getattr(found, name).argtypes = arguments
    for name in SCRATCH:
        getattr(found, name).restype = _long
    return found

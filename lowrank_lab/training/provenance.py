"""The source, the corpus, the versions and the machine that are recorded with each run."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

import torch

from lowrank_lab import distributed
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.kernels.operators import available

PACKAGE = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".cpp", ".h"}
# Files and packages whose source decides what a run computes; other changes need no new training.
TRAINING_SOURCES = (
    "config.py", "device.py", "distributed", "cpu/products.py", "cpu/widened.py", "kernels", "data",
    "models", "layers", "optim", "techniques", "methods", "training/batches.py", "training/ddp.py",
    "training/evaluate.py", "training/events.py", "training/extend.py", "training/finite.py",
    "training/fsdp.py", "training/fsdp_layout.py", "training/fsdp_state.py",
    "training/gradients.py", "training/kinds.py", "training/loop.py", "training/preflight.py",
    "training/run_state.py", "training/schedule.py", "training/step.py", "training/trainer.py",
)  # fmt: skip


def source_hash(places: tuple[str, ...] = (".",)) -> str:
    """SHA-256 of the library's own source, or of some of its files and packages.

    The notebooks that an installed library ships are no part of it.
    """
    digest = hashlib.sha256()
    for place in places:
        path = PACKAGE / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix not in SUFFIXES or file.is_relative_to(PACKAGE / "shipped"):
                continue
            digest.update(file.relative_to(PACKAGE).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def training_source() -> str:
    """SHA-256 of the source that decides what a run computes; kept with every run."""
    return source_hash(TRAINING_SOURCES)


def ran_on(device: torch.device, corpus: Corpus) -> dict[str, Any]:
    """The facts that config.json keeps beside the configuration."""
    cuda = device.type == "cuda"
    return {
        "training_source": training_source(),
        "corpus_sha256": corpus.facts["sha256"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "threads": torch.get_num_threads(),
        "kernels": "torch" if cuda or not available() else "own",  # see lowrank_lab/kernels
        "processes": distributed.world_size(),
    }


def processor() -> str:
    """The CPU's name and the instruction set that torch uses, such as `AMD EPYC (AVX512)`."""
    return f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def cpu_name() -> str:
    """The CPU's name, which Linux has in /proc/cpuinfo, where `platform` doesn't look."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "cpu"

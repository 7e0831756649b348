"""A folder with all that a check of a card needs on a machine without network.

It has this code, wheels of the packages that a machine with torch and transformers lacks, a corpus
of 10 M tokens, and what the card's figures are compared with: simulated memory, and the first
losses of training on a CPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu_checks import corpus, memory, training
from lowrank_lab import METHODS, InputError, RunConfig
from lowrank_lab.data.prepare import prepare as prepare_corpus

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 60_000_000
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
COMPILED = ("pydantic-core", "torchao")  # wheels for each Python
PURE = (
    "pydantic", "annotated-types", "typing-inspection", "typing-extensions", "click", "tqdm",
    "galore-torch", "apollo-torch", "fira",
)  # fmt: skip
RUN = """#!/bin/sh
# Checks this machine's CUDA card; all arguments go to benchmarks/gpu.py (--help lists them).
here=$(cd "$(dirname "$0")" && pwd)
python=${{PYTHON:-python3}}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \\
	--find-links "$here/wheels" --target "$site" {packages} || exit 2
PYTHONPATH="$here:$site${{PYTHONPATH:+:$PYTHONPATH}}" \\
	"$python" -m benchmarks.gpu --prepared "$here" "$@"
"""
README = """Check of a CUDA card, made by `make gpu-check`.

Copy this folder to a machine with a card, torch and transformers. No network is needed. There:

    ./run --out results.jsonl

It takes at most 8 minutes, writes a line of JSON per measured fact, prints a table at the end, and
ends with status 0 if every check has passed. Linux on x86-64, Python {first} to {last}; PYTHON
names another interpreter than python3.
"""


def write_wheels(target: Path) -> None:
    """Wheels of our pinned versions; of compiled packages one for each Python."""
    pinned = ["-c", str(ROOT / "constraints.txt"), "--no-deps", "--quiet"]
    _pip("wheel", "--wheel-dir", str(target), *pinned, *PURE)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    for python in PYTHONS:
        _pip(
            "download", "--dest", str(target), *pinned, "--only-binary=:all:", *platforms,
            "--implementation", "cp", "--python-version", python, *COMPILED,
        )  # fmt: skip


def _pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError("wheels", " ".join(words[:1]), f"pip could not get them: {last}")


def write_code(target: Path) -> None:
    """The library, the benchmarks, and the script that starts them."""
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("lowrank_lab", "benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=skipped)
    names = " ".join((*PURE, *COMPILED))
    (target / "run").write_text(RUN.format(packages=names))
    (target / "run").chmod(0o755)
    text = README.format(first=PYTHONS[0], last=PYTHONS[-1])
    (target / "README.txt").write_text(text)


def write_corpus(target: Path) -> None:
    """The first 10 M tokens of the corpus `python` with a BPE of 32,000 entries."""
    config = RunConfig(corpus="python", vocab_size=corpus.VOCABULARY)
    corpus.cut(prepare_corpus(config), target / "corpus", corpus.TOKENS)


def write_expected(target: Path, report: Callable[[str], Any]) -> None:
    """Simulated memory of every method on CUDA, and first losses on this machine's CPU."""
    found: dict[str, Any] = {"memory": {}, "first_losses": {}}
    for method in METHODS:
        report(f"simulating the memory of {method}")
        found["memory"][method] = memory.simulated(method, "cuda")
    tokens = corpus.opened(target, target, tiny=False)
    for name in training.CASES:
        report(f"first losses of 60m, {name}, on the CPU")
        found["first_losses"][name] = training.first_losses(tokens, name)
    (target / "expected.json").write_text(json.dumps(found, indent=1) + "\n")


def prepare(target: Path, report: Callable[[str], Any] = lambda line: None) -> int:
    """Write the folder anew; its bytes.

    Raises:
        InputError: it is something else, pip gets no wheels, or all of it is too large.
    """
    if target.exists() and not (target / "expected.json").exists() and any(target.iterdir()):
        raise InputError("folder", str(target), "a new one, or one that this command has written")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "expected.json").write_text("{}\n")
    report("wheels")
    write_wheels(target / "wheels")
    report("code and corpus")
    write_code(target)
    write_corpus(target)
    write_expected(target, report)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise InputError("folder", str(target), f"{MOST_BYTES} bytes at most; it has {size}")
    return size


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Prepare FOLDER for the check of a card, on a machine with network."""
    try:
        size = prepare(folder, click.echo)
    except InputError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    click.echo(f"{folder}: {size / 1e6:.0f} MB. Copy it to a machine with a CUDA card, torch and")
    click.echo(f"transformers, and run there: {folder.name}/run --out results.jsonl")


if __name__ == "__main__":
    main()

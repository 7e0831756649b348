"""The folders of corpora: each is built once, beside its place, and renamed into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lowrank_lab.data.corpus import Corpus
from lowrank_lab.data.splits import SPLITS
from lowrank_lab.data.token_files import forget_progress, shard_paths, workplace


def short_hash(value: object) -> str:
    """Ten hexadecimal digits of a value's hash: what tells corpora of one name apart."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:10]


def open_or_build(folder: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> Corpus:
    """Open a corpus, or build it beside its place and rename it into it."""
    if not (folder / "corpus.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with workplace(folder) as target:
            facts = {**build(target), "name": name}
            files = [path for split in SPLITS for path in shard_paths(target, split)]
            sizes = {s: sum(p.stat().st_size for p in shard_paths(target, s)) for s in SPLITS}
            facts["tokens"] = {split: size // 2 for split, size in sizes.items()}
            facts["sha256"] = _sha256(files)
            (target / "README.md").write_text(_readme(facts), "utf-8", "surrogateescape")
            forget_progress(target)
            (target / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
            target.chmod(0o755)
            try:
                target.rename(folder)
            except OSError:  # another process was faster, with the same corpus
                if not (folder / "corpus.json").exists():
                    raise
    return Corpus(folder, json.loads((folder / "corpus.json").read_text()))


def _sha256(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of all files, in order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def _readme(facts: dict[str, Any]) -> str:
    lines = [f"# Corpus {facts['name']}", "", "Packed uint16 tokens, one file per split.", ""]
    kinds = [kind for kind in ("documents", "bytes", "tokens") if kind in facts]
    lines += ["| split | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    lines += [f"| {s} | " + " | ".join(f"{facts[k][s]:,}" for k in kinds) + " |" for s in SPLITS]
    lines += ["", f"Vocabulary: {facts['vocab_size']}. SHA-256: `{facts['sha256']}`."]
    if "entropy" in facts:
        lines += [
            f"Entropy rate {facts['entropy']:.6f}, of single symbols "
            f"{facts['unigram_entropy']:.6f} nats per token."
        ]
    return "\n".join(lines) + "\n"

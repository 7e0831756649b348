"""Memory does not grow with the corpus."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest


def pages(count):
    chance = random.Random(0)
    return [f"page {i}: " + "".join(chance.choices("abc é漢\n", k=60)) for i in range(count)]


MEASURE = """
import json, resource, sys
from pathlib import Path
from lowrank_lab.config import RunConfig
from lowrank_lab.data.prepare import prepare
corpus = prepare(RunConfig(corpus=sys.argv[1], vocab_size="byte"), Path(sys.argv[2]))
corpus.batch("train", 0, batch=16, sequence_length=256)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([peak * 1024, sum(corpus.facts["bytes"].values())]))
"""


@pytest.mark.parametrize("kind", ["text", "c4"])
def test_memory_does_not_grow_with_the_corpus(kind, tmp_path):
    """At $LOWRANK_LAB_SCALE MB (default 60) and a tenth of it."""
    scale = int(os.environ.get("LOWRANK_LAB_SCALE", "60"))
    peaks = []
    for megabytes in (scale / 10, scale):
        path = tmp_path / (f"{megabytes}.txt" if kind == "text" else f"{megabytes}.json.gz")
        lines = pages(1000)
        with path.open("wb") if kind == "text" else gzip.open(path, "wb", 1) as file:
            for index in range(int(megabytes * 1e6) // 10_000):
                text = f"{index} " + (lines[index % 1000] + "\n") * 100
                row = text if kind == "text" else json.dumps({"text": text})
                file.write(f"{row}\n".encode())
        command = [sys.executable, "-c", MEASURE, f"{kind}:{path}", str(tmp_path / "corpora")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, size = json.loads(done.stdout)
        assert size > megabytes * 0.7e6
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 0.1 * scale * 1e6 + 10e6

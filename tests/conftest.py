"""What all tests share: a CPU, one thread, and a data folder of their own."""

import gzip
import json
import os
import random
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from paths import NOTEBOOKS
from studies import BASE, write_short_notebooks

# torch's cache of compiled kernels doesn't tell the vector widths of CPUs apart: a kernel that was
# written for AVX2 and is compiled for AVX-512 writes beyond its outputs. One cache per width.
CACHE = f"lowrank_lab_inductor_{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / CACHE))
# Goldens and tolerances are those of a CPU, on machines with a card too.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
WORDS = "the model a rank of weight and gradient is low when step moment factor to sum".split()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def form(request, monkeypatch):
    """How optimizers update parameters: `single` one by one, or `stacked` as on CUDA, even one."""
    from lowrank_lab.device import cuda_path
    from lowrank_lab.optim import matrix_updates

    monkeypatch.setattr(matrix_updates, "FEWEST", 1)
    with cuda_path() if request.param == "stacked" else nullcontext():
        yield request.param


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A folder of 120 small text files, about 240 kB."""
    folder = tmp_path_factory.mktemp("texts")
    chance = random.Random(0)
    for index in range(120):
        lines = [" ".join(chance.choices(WORDS, k=12)) + f" {index}." for _ in range(30)]
        (folder / f"{index:03d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def text_corpus(text_folder):
    """The name of a small text corpus, as RunConfig takes it."""
    return f"text:{text_folder}"


@pytest.fixture(scope="session", autouse=True)
def data(tmp_path_factory):
    """The data folder of this test session: corpora are built there once."""
    folder = tmp_path_factory.mktemp("data")
    patch = pytest.MonkeyPatch()
    patch.setenv("LOWRANK_LAB_DATA", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The finished run of a configuration, trained once."""
    from lowrank_lab import train

    runs = {}

    def of(config):
        key = config.model_dump_json()
        if key not in runs:
            runs[key] = train(config, tmp_path_factory.mktemp("undisturbed"))
        return runs[key]

    return of


@pytest.fixture
def c4_names(tmp_path, monkeypatch):
    """A data folder with one small shard of C4 and a tokenizer: what a configuration calls them."""
    from lowrank_lab.data.tokenizer import byte_tokenizer

    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path / "data"))
    shards = tmp_path / "data" / "c4" / "en"
    shards.mkdir(parents=True)
    chance = random.Random(0)
    rows = [f"page {i}: " + "".join(chance.choices("abc é漢\n", k=80)) for i in range(600)]
    text = "".join(json.dumps({"text": row, "url": "none"}) + "\n" for row in rows)
    (shards / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(text.encode()))
    byte_tokenizer().save(str(shards.parent / "tokenizer.json"))
    return {"corpus": "c4:c4/en", "tokenizer": "c4/tokenizer.json"}


@pytest.fixture
def study_file(tmp_path, text_corpus):
    """Writes a study file beside copies of the notebooks, and returns its path."""
    folder = tmp_path / "notebooks"
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns("studies", ".*"))
    (folder / "studies").mkdir()

    def write(code=None, **content):
        """With `code`, runs are notebooks that hold this alone, and the comparison is empty."""
        base = {**BASE, "corpus": text_corpus, **content.pop("base", {})}
        path = folder / "studies" / "mine.yaml"
        if code is not None:
            write_short_notebooks(folder, code)
            content |= {"notebook": "short", "compare": "empty"}
        path.write_text(yaml.safe_dump({"base": base, **content}, sort_keys=False))
        return path

    return write

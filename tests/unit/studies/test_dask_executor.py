"""A study asks for a Dask scheduler that answers. Whole studies on a cluster: tests/slow."""

import sys
import time

import pytest

from lowrank_lab.config import InputError
from lowrank_lab.studies.study import run_study

pytest.importorskip("distributed")


def test_an_address_without_a_scheduler_is_refused_within_seconds(study_file, tmp_path):
    for address in ("tcp://127.0.0.1:1", "tcp://nohost.invalid:8786", "here", "tcp://h:999999"):
        started = time.monotonic()
        with pytest.raises(InputError, match="no Dask scheduler answers"):
            run_study(study_file("1"), out=tmp_path / "out", dask=address)
        assert time.monotonic() - started < 10
    assert not (tmp_path / "out").exists()


def test_without_dask_the_refusal_says_how_to_install_it(study_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'lowrank-lab\[dask\]'"):
        run_study(study_file("1"), dask="tcp://127.0.0.1:8786")

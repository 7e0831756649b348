"""Every notebook runs headless under papermill, and leaves no widget state."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
SHORT = {
    "solutions/05_spectra": {
        "corpus": f"text:{ROOT / 'lowrank_lab'}",
        "folder": "{tmp}/runs",
        "steps": 80,
    },
    "solutions/06_memory": {"model": "60m", "card": "1GB"},
    "00_start_here": {"steps": 60, "corpus": f"text:{ROOT / 'lowrank_lab'}"},
    "02_run": {"steps": 20, "corpus": "markov", "model": "tiny"},
    "03_compare": {"out": "{tmp}/compared"},
    "06_memory": {"model": "9m", "rank": 16, "measured": "tiny", "card": "300MB"},
    "08_your_own_method": {
        "steps": 20,
        "corpus": f"text:{ROOT / 'lowrank_lab'}",
        "folder": "{tmp}/runs",
    },
    "09_why_reset": {"seeds": 3},
    "10_theory": {"seeds": 2, "steps": 100},
    "solutions/09_why_reset": {"seeds": 3},
    "solutions/10_theory": {"seeds": 2, "steps": 100},
    "11_scaling": {"model": "60m"},
    "solutions/11_scaling": {"model": "60m", "draws": 20},
}


@pytest.mark.parametrize(
    "path",
    [*NOTEBOOKS, *SOLUTIONS],
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_a_notebook_runs_headless(path, tmp_path):
    own = f"solutions/{path.stem}" if path in SOLUTIONS else path.stem
    given = SHORT.get(own, {})
    values = [
        part
        for name, value in given.items()
        for part in ("-p", name, str(value).format(tmp=tmp_path))
    ]
    out = tmp_path / "out.ipynb"
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(path), str(out), *values, "--log-level", "ERROR"],
        cwd=path.parent, capture_output=True, text=True, timeout=900,
        env=os.environ | {"LOWRANK_LAB_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    notebook = json.loads(out.read_text())
    assert "widgets" not in notebook["metadata"]
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert any(
        "image/png" in o.get("data", {}) or "text/html" in o.get("data", {}) for o in outputs
    )

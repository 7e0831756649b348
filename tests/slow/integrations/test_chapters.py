"""The scripts of the chapters on other training loops run as they stand."""

import re
import warnings

import pytest
from paths import ROOT

PAGES = ("plain-loop", "transformers", "accelerate", "lightning")


@pytest.mark.parametrize("page", PAGES)
def test_the_script_of_a_chapter_runs_and_lowers_the_loss(page, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text()
    (script,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    found = {"__name__": "__main__"}
    with warnings.catch_warnings(action="ignore"):
        exec(compile(script, f"{page}.md", "exec"), found)
    losses = found["losses"]
    assert len(losses) == found["STEPS"]
    assert sum(losses[-10:]) / 10 < losses[0] - 1
    assert re.search(r"^loss \d\.\d\d → \d\.\d\d$", capsys.readouterr().out, re.M)

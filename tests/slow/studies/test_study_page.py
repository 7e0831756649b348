"""Peaks that the chapter on the study and the README print are those of the simulation."""

import re

import nbformat
import papermill
from paths import ROOT

import lowrank_lab as lab
from lowrank_lab.config import RunConfig
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.planning.fit import LONG


def test_peaks_at_1b_are_those_of_the_simulation():
    peaks = {}
    for method in ("low-rank", "galore", "full-rank"):
        rank = {"rank": 512} if METHODS[method].uses_rank else {}
        config = RunConfig(
            model="1b", method=method, precision="bf16", batch=16, steps=LONG,
            vocab_size=32_000, corpus="markov", **rank,
        )  # fmt: skip
        peaks[method] = lab.simulate_memory(config, "cuda").steps["next"].peak.total / 1e9
    page = " ".join((ROOT / "docs" / "explanation" / "study.md").read_text().split())
    ratio = peaks["low-rank"] / peaks["full-rank"]
    assert f"with 16 × 256 tokens, it is {ratio:.2f} times" in page
    readme = " ".join((ROOT / "README.md").read_text().split())
    shown_peaks = "a step on CUDA peaks at {low-rank:.1f}, {galore:.1f} and {full-rank:.1f} GB"
    assert shown_peaks.format(**peaks) in readme


def test_peaks_of_the_table_are_those_of_the_simulation():
    page = (ROOT / "docs" / "explanation" / "study.md").read_text()
    rows = re.findall(r"^\| ([a-z8, -]+)(?: \(AdamW\))? \| .* \| (\S+) \| (\S+) \|$", page, re.M)
    shown = [row for row in rows if row[0].split(", ")[0] in METHODS and "±" not in row[2]]
    assert len(shown) == 6
    for methods, *peaks in shown:
        method = methods.split(", ")[0]
        rank = {"rank": 512} if METHODS[method].uses_rank else {}
        config = RunConfig(
            model="1b", method=method, precision="bf16", batch=16, steps=LONG,
            vocab_size=32_000, corpus="markov", **rank,
        )  # fmt: skip
        for recomputed, peak in zip((False, True), peaks, strict=True):
            found = lab.simulate_memory(config.replace(activation_checkpointing=recomputed), "cuda")
            assert peak == f"{found.peak.total / 1e9:.1f}", (method, recomputed)


def test_gains_on_the_linear_teacher_are_those_of_its_notebook(tmp_path):
    made = tmp_path / "theory.ipynb"
    papermill.execute_notebook(ROOT / "notebooks" / "10_theory.ipynb", made, cwd=made.parent)
    outputs = [o for cell in nbformat.read(made, 4).cells for o in cell.get("outputs", [])]
    texts = [o.get("data", {}).get("text/plain", "") for o in outputs]
    page = (ROOT / "docs" / "explanation" / "study.md").read_text()

    def row_of(table, start):
        """The numbers of the line of a printed table that starts so, with their intervals."""
        line = next(line for line in table.splitlines() if line.startswith(start))
        return re.findall(r"-?[\d.]+ ± [\d.]+", line) or line.removeprefix(start).split()

    gains = next(text for text in texts if text.startswith("imbalance") and "adam, keep" in text)
    for words, way in {"kept": "keep", "transported": "transport", "reset": "reset"}.items():
        assert f"| {words} | {' | '.join(row_of(gains, f'adam, {way}'))} |" in page
    known = next(text for text in texts if "1 loss over floor" in text)
    assert f"lowest of all runs | at least 1 | {row_of(known, '1 loss over floor')[-2]} |" in page
    for words, start in (
        ("at twice the rate over that at the rate | 2", "2 drift at 2η over that at η, SGD"),
        (
            "from balanced factors: the same ratio | 2",
            "3 change at 2η over that at η, imbalance 1 ",
        ),
        ("from unbalanced factors | 1", "3 change at 2η over that at η, imbalance 10"),
    ):
        assert "{} | {} ± {} |".format(words, *row_of(known, start)[-2:]) in page
    cosines = next(text for text in texts if "transport v" in text)
    assert {cell.split()[0] for cell in row_of(cosines, "transport m")} == {"1.00"}
    reach = [sorted(c.split()[0] for c in row_of(cosines, f"{way} v"))[::3]
             for way in ("transport", "keep")]  # fmt: skip
    assert "transported, kept | – | {} to {}, {} to {} |".format(*reach[0], *reach[1]) in page

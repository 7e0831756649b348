"""The numbers of kept studies' reports, as golden/reports.json has them.

`python tests/golden_reports.py` writes that file anew, from the records in data/study.
"""

import hashlib
import json
import math

from paths import GOLDEN, NOTEBOOKS, ROOT

from lowrank_lab.analysis.tables import claims, differences, structure, summary
from lowrank_lab.report import asked_in
from lowrank_lab.runs.run import complete_runs, finals_of

STUDIES = ROOT / "data" / "study"
REPORTS = GOLDEN / "reports.json"


def numbers_of(study):
    """Columns of the report's tables, and a hash of all that its runs recorded."""
    runs = complete_runs(study)
    finals = finals_of(runs, study)
    table = summary(finals)
    pairs = asked_in(NOTEBOOKS / "studies" / f"{study.name}.yaml")[1]
    tables = {
        "table": table,
        "claims": claims(finals, pairs),
        "differences": differences(finals, table["label"]),
        "structure": structure(runs),
    }
    labels = table["label"].tolist()
    columns = {
        f"{name}: {column}": [short(value, labels) for value in values]
        for name, found in tables.items()
        for column, values in found.items()
    }
    return {"labels": labels, **columns, "records": hash_of(runs)}


def short(value, labels):
    """A label as its place, a float with the ten digits that are compared, None for NaN."""
    if isinstance(value, str):
        return labels.index(value) if value in labels else value
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.10g}")
    return value.item() if hasattr(value, "item") else value


def hash_of(runs):
    """SHA-256 of all records, every float exactly; what is null counts as missing."""
    digest = hashlib.sha256()
    for run in runs:
        found = run.records
        parts = (found.facts, found.result, found.memory, found.metrics, found.spectra)
        text = json.dumps(without_nulls((run.folder.name, *parts)), sort_keys=True)
        digest.update(text.encode())
    return digest.hexdigest()


def without_nulls(value):
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list | tuple) else value


def dumped(value):
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    studies = sorted(path for path in STUDIES.iterdir() if path.is_dir())
    lines = []
    for study in studies:
        columns = (f"  {dumped(k)}: {dumped(v)}" for k, v in numbers_of(study).items())
        lines.append(f'"{study.name}": {{\n' + ",\n".join(columns) + "\n}")
    REPORTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")

"""Reports on folders of runs: a table, figures and a self-contained HTML page."""

from lowrank_lab.report.drawings import best, memory_of, origins, pictures
from lowrank_lab.report.kept import keep
from lowrank_lab.report.ladder import ladder_pictures
from lowrank_lab.report.page import asked_in, write_report
from lowrank_lab.report.picture import Picture

__all__ = [
    "Picture", "asked_in", "best", "keep", "ladder_pictures", "memory_of", "origins", "pictures",
    "write_report",
]  # fmt: skip

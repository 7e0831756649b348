"""Widgets for notebooks over runs and figures; headless, each shows a plain figure."""

from lowrank_lab.widgets.grid import explore as explore_grid
from lowrank_lab.widgets.notebook import choose_spectra, is_live, progress, what_fits

__all__ = ["choose_spectra", "explore_grid", "is_live", "progress", "what_fits"]

"""Widgets for notebooks; headless, each shows a plain figure or a slider without a kernel."""

from lowrank_lab.widgets.grid import explore as explore_grid
from lowrank_lab.widgets.notebook import choose_spectra, is_live, progress, what_fits

__all__ = ["choose_spectra", "explore_grid", "is_live", "progress", "what_fits"]

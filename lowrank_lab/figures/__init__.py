"""Figures of saved runs: each function takes a table and returns a matplotlib `Figure`.

No figure needs a model. `save` writes PNG, SVG, and the numbers as CSV. A method has one colour in
all figures; its techniques change the line style.
"""

from lowrank_lab.analysis.rates import rate_table
from lowrank_lab.figures.comparison import (
    claim_table,
    claims,
    difference_table,
    differences,
    over_ranks,
    rank_table,
)
from lowrank_lab.figures.costs import loss_over_costs
from lowrank_lab.figures.drawing import (
    PALETTE,
    STYLE,
    Drawing,
    alt_text,
    canvas,
    colour_of,
    data_uri,
    empty_figure,
    label_ends,
    png,
    refresh,
    rows_of,
    save,
    spread,
    style_of,
    svg,
    unit_of,
)
from lowrank_lab.figures.grid import MAX_MAPS, effect_table, grid_tradeoff, heat_maps
from lowrank_lab.figures.ladder import gap_over_size, gaps_by_row
from lowrank_lab.figures.layer_facts import (
    FACTS,
    effective_rank_curves,
    effective_rank_table,
    fact_curves,
    layer_facts,
)
from lowrank_lab.figures.learning_rates import rates
from lowrank_lab.figures.memory import (
    CATEGORIES,
    STEP_CATEGORIES,
    compared_memory,
    memory_bars,
    memory_course,
    memory_course_table,
    memory_over_sizes,
    memory_table,
    memory_timeline,
)
from lowrank_lab.figures.momentum import cosine_beside_gain, cosine_table, momentum_bars
from lowrank_lab.figures.page import darkened, live_image
from lowrank_lab.figures.positions import position_curves
from lowrank_lab.figures.predictions import against, interval_lines
from lowrank_lab.figures.spectra import (
    compared_spectra,
    last_spectra,
    share_curves,
    spectrum_curves,
)
from lowrank_lab.figures.spectrum_maps import spectra_over_training
from lowrank_lab.figures.training import (
    curve_table,
    loss_curves,
    tradeoff,
    tradeoff_table,
    training_curves,
    training_table,
)

__all__ = [
    "CATEGORIES",
    "FACTS",
    "MAX_MAPS",
    "PALETTE",
    "STEP_CATEGORIES",
    "STYLE",
    "Drawing",
    "against",
    "alt_text",
    "canvas",
    "claim_table",
    "claims",
    "colour_of",
    "compared_memory",
    "compared_spectra",
    "cosine_beside_gain",
    "cosine_table",
    "curve_table",
    "darkened",
    "data_uri",
    "difference_table",
    "differences",
    "effect_table",
    "effective_rank_curves",
    "effective_rank_table",
    "empty_figure",
    "fact_curves",
    "gap_over_size",
    "gaps_by_row",
    "grid_tradeoff",
    "heat_maps",
    "interval_lines",
    "label_ends",
    "last_spectra",
    "layer_facts",
    "live_image",
    "loss_curves",
    "loss_over_costs",
    "memory_bars",
    "memory_course",
    "memory_course_table",
    "memory_over_sizes",
    "memory_table",
    "memory_timeline",
    "momentum_bars",
    "over_ranks",
    "png",
    "position_curves",
    "rank_table",
    "rate_table",
    "rates",
    "refresh",
    "rows_of",
    "save",
    "share_curves",
    "spectra_over_training",
    "spectrum_curves",
    "spread",
    "style_of",
    "svg",
    "tradeoff",
    "tradeoff_table",
    "training_curves",
    "training_table",
    "unit_of",
]  # fmt: skip

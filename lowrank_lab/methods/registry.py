"""METHODS: one row per method, the only home of its facts and defaults, in the file of its family.

Learning rates and scales at width 64 are the best of the study at rank 16 and 20 tokens per
parameter (data/study/README.md: stage 2 of tuning); those at width 96 the best of its larger model
(GoLore has GaLore's). From width 512 on they are those of notebooks/studies/paper_*.yaml, which
name the script or guess behind each; other methods scale their learning rate with width as full
rank does. Over ranks (data/study/ranks and ranks_rates) the best rate is the same up to a quarter
of the width, and half of it at half the width.

Rates at width 64 of rows with `short_tuning` are the best of 200 steps and two seeds, in factors of
two (data/study/since_2025). From width 512 on they are those of the authors' scripts; NorMuon has
Muon's, which suit steps of the same size, and Spectron guesses: no rate of its pretraining is
published.

Colours are Okabe and Ito's, and others chosen to be far from them and from each other, also as
colour-blind readers see them; a test measures it.
"""

from __future__ import annotations

from lowrank_lab.methods.dense_rows import DENSE, FULL_RANK
from lowrank_lab.methods.factorized_rows import FACTORIZED
from lowrank_lab.methods.method import Method
from lowrank_lab.methods.projected_rows import PROJECTED

ROWS = (FULL_RANK, *FACTORIZED, *PROJECTED, *DENSE)

METHODS: dict[str, Method] = {method.name: method for method in ROWS}

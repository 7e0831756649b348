"""METHODS: one row per method, the only home of its facts and defaults, in the file of its family.

Learning rates and scales at width 64 are the best of the study at rank 16 and 20 tokens per
parameter (data/study/README.md: stage 2 of tuning); those at width 96 the best of its larger model
(GoLore has GaLore's). From width 512 on they are those of notebooks/studies/paper_*.yaml, which
name the script or guess behind each; other methods scale their learning rate with width as full
rank does. Over ranks (data/study/ranks and ranks_rates) the best rate is the same up to a quarter
of the width, and half of it at half the width. Not tuned yet are those of SCALE (its scripts' rates
from width 512 on), NorMuon (Muon's, which suit steps of the same size) and Spectron (a guess: no
rate of its pretraining is published).

Rates of ldadam and frugal are not tuned yet: from width 512 on they are those of the authors'
scripts, at width 64 that of full rank. CoLA's are its authors' from width 512
on, and those at 512 below it.

Colours are Okabe and Ito's, which colour-blind readers can tell apart and which survive print, and
those that Tol calls muted.
"""

from __future__ import annotations

from lowrank_lab.methods.dense_rows import DENSE, FULL_RANK
from lowrank_lab.methods.factorized_rows import FACTORIZED
from lowrank_lab.methods.method import Method
from lowrank_lab.methods.projected_rows import PROJECTED

ROWS = (FULL_RANK, *FACTORIZED, *PROJECTED, *DENSE)

METHODS: dict[str, Method] = {method.name: method for method in ROWS}

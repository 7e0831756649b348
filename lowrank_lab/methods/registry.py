"""METHODS: one row per method, the only home of its facts and defaults, in the file of its family.

Below width 512 learning rates (`lr`, `rest_lr`), β₂, momenta and scales are those that the study's
tuning found (data/study/README.md): at width 48 rates_s1, betas_s1, others_rates_s1 and
others_betas_s1; at widths 64 and 96, with the same scales and β₂, rates_s2 and rates_s3 for the
rows in them, and of other widths between those of a row. Of Kaiming low-rank rate and α are those
of its controls, and β₂ is that of low-rank from an SVD; LORO's rate was found with factors from an
SVD. At widths 64 and 96 AdamW in 8 bits has AdamW's rates; GoLore has GaLore's. α of LoRA, ReLoRA
and SLTrain is that of rank 12 at width 48, four and two times the rank. At width 48 the best rate
moves within a factor of two from a rank of a sixteenth to half of the width; at half, low-rank
diverges at twice the default (ranks_rates_s1, one seed).

From width 512 on they are those of notebooks/studies/paper_*.yaml, which name the script or guess
behind each, or of the authors' scripts; others scale their learning rate with width as full rank
does. NorMuon has Muon's there, which suit steps of the same size, and Spectron guesses: no rate of
its pretraining is published.

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

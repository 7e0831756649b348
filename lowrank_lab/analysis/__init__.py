"""Numbers from runs and matrices: spectra, statistics, tables, and a toy problem."""

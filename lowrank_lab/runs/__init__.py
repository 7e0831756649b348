"""Run folders: records on disk, tables of many runs, and what becomes of a trained model."""

"""Run folders: records on disk, tables of many runs, sampling and export of trained models."""

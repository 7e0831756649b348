"""Batches of notebooks: study files, jobs, selection, and execution by papermill."""

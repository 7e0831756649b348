"""Batches of notebooks: study files, the jobs planned from them, and execution by papermill."""

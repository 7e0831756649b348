"""Bytes of training by category: by formula, and from the storages of a step."""

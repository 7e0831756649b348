"""Bytes of training: by formula, and by tracking the storages of a step."""

"""Corpora: text → documents → token files → batches that are functions of seed and step."""

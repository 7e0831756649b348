"""Corpora: sources of text, tokenizers, packed token files, and the windows of training."""

"""Faster training on CPUs by settings of the whole process, which the training loop makes."""

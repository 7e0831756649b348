"""What makes training on CPUs fast, for the whole process: the training loop alone enters it."""

"""What makes training on CPUs fast, for the whole process: the trainer alone enters it."""

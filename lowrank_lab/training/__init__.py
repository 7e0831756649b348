"""Training: the loop, one step, its schedule, checkpoints and records; in one process or many."""

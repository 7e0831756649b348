"""The training loop: step, schedule, checkpoints and shards."""

"""METHODS, one row per method; from a configuration to its model and optimizer."""

"""METHODS, one row per method, and what turns a configuration into model and optimizer."""

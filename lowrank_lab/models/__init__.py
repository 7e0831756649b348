"""The LLaMA model and its attention."""

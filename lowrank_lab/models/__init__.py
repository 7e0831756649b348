"""The LLaMA model: its blocks, its causal attention and its cross-entropy."""

"""Serve compressed checkpoints in stock vLLM with a paged KV cache of fewer channels."""

__version__ = "0.2.0"

"""Compress Hugging Face decoder checkpoints offline: low-rank weights and K/V projections."""

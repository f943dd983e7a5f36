"""The quality laboratory: every method at every size, in plain transformers."""

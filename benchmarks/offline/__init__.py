"""Quality of compression methods, in plain transformers."""

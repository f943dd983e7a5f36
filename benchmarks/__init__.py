"""Measurements of the project: run from a checkout, not installed."""

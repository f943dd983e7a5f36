"""Decode steps of engines that take turns: what a compressed cache costs where it gains nothing."""

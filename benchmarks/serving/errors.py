"""What can go wrong while measuring: the message is complete without a traceback."""


class BenchmarkError(Exception):
    """What was given or found, what is accepted, where, and the remedy."""

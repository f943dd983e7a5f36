"""One folder per operation: a reference that defines it and its fast paths."""

"""Regularizers and probes for long-range dependencies in any network."""

"""Spectra and ranks of tensors and factorizations, decomposition and rounding."""

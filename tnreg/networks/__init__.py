"""Indices and sizes of a tensor network, its contraction plans, and products at any scale."""

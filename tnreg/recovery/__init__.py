"""Completion by least squares in every weight, with ranks and trees found from the data."""

"""Convolutional networks that factorizations are, image classifiers made of them, export and penalties."""

"""The weights of a network as a trainable module."""

"""Trees found from tensors, factorizations and samples; tensors known as functions."""

"""Weights in and out. headers, pickles and names are torch-free; the rest reads and writes tensors."""

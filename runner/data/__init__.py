"""Tensors of the dataset: pictures to pixels, encodings from the store, batches ahead of the step."""

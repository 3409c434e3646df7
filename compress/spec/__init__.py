"""A checkpoint without its weights: structure, logical tensors and number formats. Imports no torch."""

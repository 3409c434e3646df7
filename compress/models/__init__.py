"""Transformers models: loading a checkpoint strictly, emulating quantised inputs, comparing with stock loading."""

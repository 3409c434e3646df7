"""The config of compressed-tensors, by which stock loaders read codes.

`write` renders it, `parse` reads that of other tools, `loaders` knows which codes stock loaders take.
"""

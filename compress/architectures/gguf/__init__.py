"""GGUF files of llama.cpp: what a file's metadata say of a model, and the other way round.

`families` has the tables, `reading` makes a config of metadata, `writing` makes metadata of a config.
"""

from compress.architectures.gguf.metadata import unknown_rules
from compress.architectures.gguf.reading import SCALE, gguf_model
from compress.architectures.gguf.writing import GgufLayout, GgufPlace, UnwritableError, gguf_layout

__all__ = ["SCALE", "GgufLayout", "GgufPlace", "UnwritableError", "gguf_layout", "gguf_model", "unknown_rules"]

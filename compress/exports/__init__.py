"""Exports: a checkpoint as a file of another runtime. A file or folder per target; `base` is the contract.

`get` finds a target by name, `export` writes. Importing this package loads neither torch nor the libraries of the targets.
"""

from compress.exports.export import export, planned
from compress.exports.table import TARGETS, get

__all__ = ["TARGETS", "export", "get", "planned"]

"""The Python API: the commands of the command line as functions that return values and print nothing."""

from compress.api.checkpoints import diff, inspect, load, register_attention, unpack
from compress.api.exports import export
from compress.api.fits import fit
from compress.api.passes import apply
from compress.api.quality import evaluate, gate
from compress.api.recipes import check, plan, read_recipe, run

__all__ = [
    "apply",
    "check",
    "diff",
    "evaluate",
    "export",
    "fit",
    "gate",
    "inspect",
    "load",
    "plan",
    "read_recipe",
    "register_attention",
    "run",
    "unpack",
]

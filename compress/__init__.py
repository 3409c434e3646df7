"""Make Hugging Face checkpoints smaller, pass by pass, and gate the result.

    recipe.yaml ▶ recipe ▶ plan ▶ pipeline of passes ▶ evaluation ▶ report ▶ gates ▶ exit status

`run` runs a recipe, `apply` one pass, `load` opens any checkpoint that this project writes as a transformers model,
`plan` and `inspect` read headers alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import apply as apply
    from compress.api import load as load
    from compress.api import plan as plan
    from compress.api import register_attention as register_attention
    from compress.api import run as run
    from compress.api import unpack as unpack

__version__ = "0.1.0"
__all__ = ["__version__", "apply", "load", "plan", "register_attention", "run", "unpack"]


def __getattr__(name: str) -> Any:
    """Import the API when it is first used, so that `import compress` costs nothing."""
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("compress.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Make Hugging Face checkpoints smaller, pass by pass, and gate the result.

    recipe.yaml ▶ recipe ▶ plan ▶ pipeline of passes ▶ evaluation ▶ report ▶ gates ▶ exit status

`run` runs a recipe, `check` and `plan` try it on headers alone, `apply` applies one pass. `fit` chooses the passes for a
bound on bytes. `load` opens any checkpoint that this project writes as a transformers model, `unpack` writes its dense twin,
`export` a file of another runtime. `inspect` and `diff` show what checkpoints hold, `evaluate` and `gate` measure and judge
them. What can go wrong is a `CompressError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import apply as apply
    from compress.api import check as check
    from compress.api import diff as diff
    from compress.api import evaluate as evaluate
    from compress.api import export as export
    from compress.api import fit as fit
    from compress.api import gate as gate
    from compress.api import inspect as inspect
    from compress.api import load as load
    from compress.api import plan as plan
    from compress.api import register_attention as register_attention
    from compress.api import run as run
    from compress.api import unpack as unpack
    from compress.errors import CompressError as CompressError

__version__ = "0.1.0"
__all__ = [
    "CompressError",
    "__version__",
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
    "register_attention",
    "run",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """Import the API when it is first used, so that `import compress` costs nothing."""
    if name in __all__:
        from importlib import import_module

        value = getattr(import_module("compress.errors" if name == "CompressError" else "compress.api"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names of the API, for completion in a shell or a notebook."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

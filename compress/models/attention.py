"""Which attention function of transformers a model computes with."""

from __future__ import annotations

from typing import Any

from compress.architectures import find
from compress.errors import CheckpointError, CompressError
from compress.spec.spec import Spec

#: Names that `implementation` takes.
NAMES = ("auto", "compress_local", "sdpa", "eager")


def implementation(asked: str | None, spec: Spec, stock: Any, config: Any) -> str | None:
    """Value for ``attn_implementation`` of a transformers class; None for transformers' own choice.

    ``auto`` is ``compress_local`` where the record of the family has windows or eager attention alone, if it computes the same.
    ``compress_local`` is registered in transformers first.

    Raises:
        CompressError: another name.
        CheckpointError: the model does not compute with ``compress_local``.
    """
    if asked not in (None, *NAMES):
        raise CompressError(
            f"no attention function is called {asked!r}",
            where="attention",
            fix=f"give {', '.join(NAMES[:-1])} or {NAMES[-1]}",
        )
    problem = _problem(spec, stock, config)
    if asked == "auto":
        record = find(spec.structure.config)
        windows = record is not None and record.window(spec.structure.config)
        asked = "compress_local" if problem is None and record is not None and (windows or record.eager) else None
    if asked == "compress_local":
        if problem is not None:
            raise CheckpointError(
                f"compress_local does not serve {stock.__name__}: {problem}",
                where="attention",
                fix="load it with `attention=None`",
            )
        from compress.checkpoint.attention.interface import register

        register()
    return asked


def _problem(spec: Spec, stock: Any, config: Any) -> str | None:
    """Why the model does not compute with ``compress_local``; None if it does."""
    text = config.get_text_config(decoder=True)
    if not getattr(stock, "_supports_attention_backend", False):
        return "its attention is not called through transformers' table of functions"
    if config.is_encoder_decoder or not stock.can_generate():
        return "it is not a causal language model"
    if getattr(text, "attn_logit_softcapping", None):
        return "its scores are capped (attn_logit_softcapping)"
    if getattr(text, "attention_dropout", None):
        return "its attention has dropout (attention_dropout)"
    if any(edit.kind == "local" for edit in spec.structure.edits):
        return "its heads have windows of their own"
    return None

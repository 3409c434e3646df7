"""Documents as a model reads them: chats in the tokenizer's template, texts as token ids."""

from __future__ import annotations

from typing import Any

from compress.data import templates
from compress.data.documents import Document
from compress.errors import DataError, one_line


def no_template(document: Document) -> DataError:
    """The error for a chat that the tokenizer has no template for."""
    return DataError(
        "is a chat, and the tokenizer has no chat template",
        where=document.id,
        fix="take plain text, or a checkpoint whose tokenizer has one",
    )


def rendered(document: Document, tokenizer: Any) -> str:
    """The text that a model reads: a chat in the tokenizer's template. Raises `DataError` where it has none."""
    if document.messages is None:
        return document.text
    if not tokenizer.chat_template:
        raise no_template(document)
    try:
        return templates.apply(tokenizer, document.messages)
    except Exception as error:  # templates raise what they like: jinja2's errors, ValueError, KeyError
        raise DataError(f"does not fit the chat template: {one_line(error)}", where=document.id) from error


def encoded(document: Document, tokenizer: Any, length: int | None = None) -> dict[str, list[int]]:
    """The model's inputs, by name, for a text or pair by itself, with the tokenizer's special tokens.

    A longer one is cut to ``length`` tokens; special tokens keep their places, and the longer text of a pair is cut first.
    Templates of chats contain the special tokens themselves.
    """
    cut: dict[str, Any] = {} if length is None else {"truncation": True, "max_length": length}
    texts = document.pair or (rendered(document, tokenizer),)
    return tokenized(tokenizer, *texts, where=document.id, add_special_tokens=document.messages is None, **cut)


def tokenized(tokenizer: Any, *texts: str, where: str | None = None, **options: Any) -> dict[str, Any]:
    """A tokenizer's output for a text or pair. Raises `DataError` where it fails, as damaged ones do on some texts."""
    try:
        return dict(tokenizer(*texts, verbose=False, **options))
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if (
            not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        ):  # Rust's, which is no Exception
            raise
        raise DataError(f"the tokenizer breaks on it: {one_line(error)}", where=where) from error


def beginning(tokenizer: Any) -> int | None:
    """Id of the beginning-of-text token that the tokenizer puts before a text by itself; None where it puts none."""
    begin: int | None = tokenizer.bos_token_id
    return begin if begin is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [begin] else None

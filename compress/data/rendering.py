"""Documents as a model reads them: chats in the tokenizer's template, texts as token ids."""

from __future__ import annotations

from typing import Any

from compress.data import templates
from compress.data.documents import Document
from compress.errors import DataError, one_line


def no_template(document: Document) -> DataError:
    """What is wrong with a chat where a tokenizer has no template for it."""
    return DataError(
        "is a chat, and the tokenizer has no chat template",
        where=document.id,
        fix="take plain text, or a checkpoint whose tokenizer has one",
    )


def rendered(document: Document, tokenizer: Any) -> str:
    """The text that a model is shown: a chat in the tokenizer's template. Raises `DataError` where it has none."""
    if document.messages is None:
        return document.text
    if not tokenizer.chat_template:
        raise no_template(document)
    try:
        return templates.apply(tokenizer, document.messages)
    except Exception as error:  # templates raise what they like: jinja2's errors, ValueError, KeyError
        raise DataError(f"does not fit the chat template: {one_line(error)}", where=document.id) from error


def encoded(document: Document, tokenizer: Any, length: int | None = None) -> dict[str, list[int]]:
    """A text or pair as a model reads it by itself: inputs by name, with the tokenizer's special tokens.

    A longer one is cut to ``length`` tokens, of which special ones keep their places; of a pair the longer text is cut first.
    Templates of chats spell the special tokens themselves.
    """
    how: dict[str, Any] = {} if length is None else {"truncation": True, "max_length": length}
    texts = document.pair or (rendered(document, tokenizer),)
    return tokenized(tokenizer, *texts, where=document.id, add_special_tokens=document.messages is None, **how)


def tokenized(tokenizer: Any, *texts: str, where: str | None = None, **how: Any) -> dict[str, Any]:
    """What a tokenizer makes of a text or pair. Raises `DataError` where it breaks, as damaged ones do on some texts."""
    try:
        return dict(tokenizer(*texts, verbose=False, **how))
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if (
            not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        ):  # Rust's, which is no Exception
            raise
        raise DataError(f"the tokenizer breaks on it: {one_line(error)}", where=where) from error


def beginning(tokenizer: Any) -> int | None:
    """Id of the beginning-of-text token that a tokenizer puts before a text of its own accord; None where it puts none."""
    begin: int | None = tokenizer.bos_token_id
    return begin if begin is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [begin] else None

"""Chat templates of checkpoints, run with limits. They are programs; transformers' sandbox bounds neither time nor memory."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

#: Seconds that the template of one chat may run; a sound one takes milliseconds.
SECONDS = 10.0
#: Integers beyond this, in a template, make texts of that length; no template in use has one.
_LARGEST = 100_000
_WIDTH = re.compile(r"[%:][^a-zA-Z%}]*[0-9]{6}")


class _TooLong(BaseException):
    """Raised in the thread of a template that does not end."""


def apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], seconds: float = SECONDS) -> str:
    """Render a chat with the tokenizer's template.

    Raises:
        ValueError: the template asks for huge texts, or does not end. Other errors of the template pass through.
    """
    chosen = tokenizer.chat_template
    for source in chosen.values() if isinstance(chosen, dict) else [chosen]:
        if (huge := _huge(str(source))) is not None:
            raise ValueError(f"it computes with {huge}, which would make huge texts")
    done: list[str] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            done.append(str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False)))
        except BaseException as error:
            failed.append(error)

    # signals reach the main thread alone, and this may be another: a thread can be told to stop from any
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TooLong))
        thread.join(1.0)
        raise ValueError(f"it runs for more than {seconds:g} s")
    if failed:
        raise failed[0]
    return done[0]


@lru_cache(maxsize=16)
def _huge(source: str) -> str | None:
    """A power, number or width in a template that makes huge texts; None where there is none."""
    import jinja2

    try:
        tokens = list(jinja2.Environment().lex(source))
    except jinja2.TemplateError:
        return None  # transformers says what is wrong
    for _, kind, text in tokens:
        if kind == "operator" and text == "**":
            return "`**`"
        if kind == "integer" and int(text.replace("_", ""), 0) > _LARGEST:
            return text[:20]
        if kind == "string" and _WIDTH.search(text):
            return text[:20]
    return None

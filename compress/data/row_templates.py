"""Templates that make one text from several columns of a row. Needs neither torch nor numpy."""

from __future__ import annotations

import string
from collections.abc import Mapping


def template_columns(template: str) -> tuple[str, ...]:
    """The columns named by a template ``{one} and {other}``, each once; ``{{`` and ``}}`` are braces. Raises `ValueError`."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template cannot be read: {error}; {{{{ and }}}} are braces") from None
    for _, name, form, conversion in parts:
        if name is not None and (not name.strip() or form or conversion):
            raise ValueError(f"the template names a column as {{column}}, not {{{name}{f':{form}' if form else ''}}}")
    if not (names := tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))):
        raise ValueError("the template names no column: write {column} where its value goes")
    return names


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """A template's text with these values of its columns."""
    return "".join(
        text + ("" if name is None else values[name]) for text, name, _, _ in string.Formatter().parse(template)
    )

"""Templates that make one text of several columns of a row."""

from __future__ import annotations

import string
from collections.abc import Mapping


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template ``{one} and {other}`` names, each once; ``{{`` and ``}}`` are braces. Raises `ValueError`."""
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
    """The text of a template whose columns have these values."""
    return "".join(
        text + ("" if name is None else values[name]) for text, name, _, _ in string.Formatter().parse(template)
    )

"""Chats as data sets hold them ▶ messages as chat templates read them. Needs neither torch nor numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from compress.errors import DataError

Message: TypeAlias = Mapping[str, Any]
#: ShareGPT's `from` ▶ the role that templates know.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def read_messages(value: Sequence[Any], field: str, where: str) -> tuple[Message, ...]:
    """Messages ``{"role", "content", …}`` from a list as data sets hold it.

    Each has `role` and `content`, or `from` and `value` (ShareGPT). Content is text; or a list of text parts, which are
    joined; or None beside `tool_calls`, which the template renders. Other keys stay, except those that are None.

    Args:
        field: that holds the list. where: file and row.

    Raises:
        DataError: a message has another form, or parts that are not text.
    """
    return tuple(_message(one, f"`{field}`", number, where) for number, one in enumerate(value, 1))


def chat_text(messages: Sequence[Message]) -> str:
    """The text of all messages, a line break between them; tool calls as JSON."""
    parts = []
    for message in messages:
        parts += [message["content"]] if message["content"] is not None else []
        parts += [json.dumps(message["tool_calls"], ensure_ascii=False)] if message.get("tool_calls") else []
    return "\n".join(parts)


def _message(one: Any, field: str, number: int, where: str) -> Message:
    keys = (
        ("from", "value")
        if isinstance(one, dict) and one.get("role") is None and one.get("from")
        else ("role", "content")
    )
    if not isinstance(one, dict) or not isinstance(one.get(keys[0]), str):
        raise DataError(
            f'{field} is a list, but not of messages {{"role": "…", "content": "…"}} or {{"from": "…", "value": "…"}}',
            where=where,
        )
    role = one[keys[0]]
    if keys[0] == "from":
        if role.lower() not in ROLES:
            raise DataError(
                f"{field}: message {number} is from {json.dumps(role)[:40]}, which is not a role",
                where=where,
                fix=f"known are: {', '.join(ROLES)}",
            )
        role = ROLES[role.lower()]
    content = _content(one.get(keys[1]), bool(one.get("tool_calls")), f"{field}: message {number}", where)
    rest = {key: value for key, value in one.items() if key not in keys and value is not None}
    return {"role": role, "content": content, **rest}


def _content(value: Any, calls: bool, what: str, where: str) -> str | None:
    """A message's text; None where it has none and calls tools."""
    if isinstance(value, str):
        return value
    if value is None:
        if calls:
            return None
        raise DataError(f"{what} has no content", where=where, fix="null stands for it beside `tool_calls` alone")
    if not isinstance(value, list):
        raise DataError(f"{what} has the content {json.dumps(value, default=str)[:40]}, not text", where=where)
    return "".join(_part(part, what, where) for part in value)


def _part(part: Any, what: str, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind in ("text", None) and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    shown = f"of the type {json.dumps(kind)[:40]}" if isinstance(kind, str) else "without text"
    raise DataError(f"{what} has a part {shown}: text alone is read", where=where, fix="leave such rows out")

"""Chats as rows of a text file: lists of messages, in the forms in which they are stored."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from esparse.errors import Mistake

EXPECTED = "expected messages with role and content"


def messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a row, in the form of chat templates; raises Mistake if it holds none.

    A list may be stored as a text of JSON, and messages in ShareGPT's form, with `from` and `value`.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise Mistake(f"{EXPECTED}, got a value of type {type(value).__name__}")
    return [_message(one) for one in value]


def _message(one: Any) -> dict[str, Any]:
    if isinstance(one, dict) and "from" in one and "role" not in one:
        roles = {"human": "user", "gpt": "assistant"}
        return {"role": roles.get(one["from"], one["from"]), "content": one.get("value")}
    if not isinstance(one, dict):
        raise Mistake(f"{EXPECTED}, got a {type(one).__name__}")
    found = {key: value for key, value in one.items() if value is not None}  # parquet fills missing keys with null
    if "role" not in found:
        raise Mistake(f"{EXPECTED}, got one with {', '.join(map(repr, found)) or 'nothing'}")
    if isinstance(found.get("content"), list):
        # A template that does not know of parts would write the list as Python does.
        found["content"] = "".join(map(_part, found["content"]))
    return found


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise Mistake(f"a message has a part of type {kind}, and only text is rendered: drop the row or the part")
    return text

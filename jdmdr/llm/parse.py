"""JSON out of a model's reply, whatever stands around it."""

from __future__ import annotations

import json
import re
from typing import Any


def without_thoughts(text: str) -> str:
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.S)


def json_object(text: str) -> dict[str, Any] | None:
    """The last JSON object of a reply; None without one.

    What a model thought before it answered, code fences and words around the object are passed over.
    """
    text = without_thoughts(text)
    found, at, decoder = None, text.find("{"), json.JSONDecoder(strict=False)
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            end = at + 1
        else:
            found = value
        at = text.find("{", end)
    return found

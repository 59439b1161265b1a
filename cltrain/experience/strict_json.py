"""JSON that every reader can take: finite numbers, few levels, strings that are Unicode."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 100  # Python follows about a thousand levels, less those of whoever calls


def loads(text: str | bytes) -> Any:
    """The value. Raises ValueError saying what is wrong, also for NaN, infinity and more than MAX_DEPTH levels."""
    too_deep = ValueError(f"nested more than {MAX_DEPTH} levels deep")
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise too_deep from None
    if _is_deep(value):
        raise too_deep
    return value


def is_unicode(value: Any) -> bool:
    """Whether no string in it holds half a surrogate pair: a JSON escape can spell one, and no text column takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [child for part in parts for child in part]
        if not level:
            return False
    return True

"""Small pieces of text for messages and tables."""

from collections.abc import Iterable
from typing import Any


def counted(n: int, noun: str) -> str:
    """``1 note``, ``2 notes``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def listed(items: Iterable[Any], separator: str = ", ", most: int = 8) -> str:
    """The first items as text, and how many more there are."""
    items = list(items)
    shown = separator.join(str(x) for x in items[:most])
    return shown + (f"{separator}... and {len(items) - most} more" if len(items) > most else "")

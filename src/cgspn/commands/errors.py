"""The error messages of commands."""

from __future__ import annotations

import errno
import re
from traceback import walk_tb

EXPECTED = (ValueError, OSError, ImportError)  # errors with readable messages, like those that this package defines


def said_of(error: Exception) -> str:
    """An error as one line of text: its message, or its type and location if it is unexpected."""
    text = " ".join(str(error).split()) or type(error).__name__
    names = [f"{f.f_globals.get('__name__')}.{f.f_code.co_name}" for f, _ in walk_tb(error.__traceback__)]
    place = next((name for name in reversed(names) if name.startswith("cgspn.")), "cgspn")
    kind = type(error)
    if isinstance(error, MemoryError) or kind.__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        amount = re.search(r"allocate ([\d.]+ ?\w+)", text)
        return f"out of memory: {place} asked for {amount[1] if amount else 'more than there is'}"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full: {text}"
    if isinstance(error, EXPECTED) or kind.__module__.startswith("cgspn."):
        return text
    return f"{kind.__name__}: {text}; --debug shows where"

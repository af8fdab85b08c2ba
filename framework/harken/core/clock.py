"""Times as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return seconds as `1h02m` or `3m05s`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"

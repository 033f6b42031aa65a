"""Formats numbers, durations and sizes for people."""


def duration(seconds: float) -> str:
    """`75` to `1:15`, `3700` to `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float | None) -> str:
    """`0.8312` to `83.1 %`; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f} %"


def format_bytes(count: int) -> str:
    """Bytes in words."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1000:,.1f} kB"


def format_value(value: str | float | bool | None) -> str:
    """A value as people write it: numbers to four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else f"{value}"

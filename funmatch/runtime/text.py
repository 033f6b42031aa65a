"""Formats durations, fractions, sizes and option values for tables and messages, and spells out patterns."""

import re
from collections.abc import Iterator, Sequence
from itertools import product

MISSING = "–"
"""Stands for a value that there is not."""
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
"""Seconds of the units of durations."""
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Encodings by the mark that editors and spreadsheets begin a file with."""


def decode(content: bytes) -> str:
    """Decodes a text that a person wrote, as UTF-8 or as its byte order mark says; the mark is no part of it.

    Raises:
        UnicodeDecodeError: UTF-16 that is cut off.
    """
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    # Bytes that are not UTF-8 stay as they are: they may be those of a file's name.
    return content.decode(encoding, "strict" if encoding == "utf-16" else "surrogateescape")


def duration(seconds: float) -> str:
    """Formats seconds as minutes or hours: 75 becomes `1:15`, 3700 becomes `1:01:40`."""
    # Rounded before it is divided: 59.6 s is `1:00`, never `0:60`.
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def listed(names: Sequence[str], most: int) -> str:
    """Lists the first names, and says how many others there are."""
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {others:,} others" if others > 0 else "")


def parse_seconds(text: str) -> float:
    """Parses a duration: 8h30m, 510m, 30600 (seconds), or as Slurm writes it, 12:00:00, 1-06 or 1-06:00:00.

    Raises:
        ValueError: it is none.
    """
    word = text.strip().lower()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", word):
        return float(word)
    if word and (parts := re.fullmatch(r"(?:([0-9.]+)d)?(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s)?", word)):
        return sum(float(part or 0) * unit for part, unit in zip(parts.groups(), UNITS.values(), strict=True))
    # 8:30 alone is refused: to Slurm it is minutes and seconds, to most people hours and minutes.
    if parts := re.fullmatch(r"([0-9]+)-([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", word) or re.fullmatch(
        r"()([0-9]+):([0-9]+):([0-9]+)", word
    ):
        return sum(float(part or 0) * unit for part, unit in zip(parts.groups(), UNITS.values(), strict=True))
    raise ValueError(
        f"{text!r} is not a duration; write e.g. 8h30m, 510m, 30600 (seconds) or 1-06:00:00 (days-hours:minutes…)"
    )


def format_rate(rate: float) -> str:
    """Formats a number per second: 0.123 becomes `0.12/s`, 12.3 `12/s`."""
    # A large network takes seconds for a step, which `0/s` would not tell from one that hangs.
    digits = 0 if rate >= 10 else 1 if rate >= 1 else 2
    return f"{rate:,.{digits}f}/s"


def counted(count: int, noun: str) -> str:
    """Formats a number of things, named in the singular: `1 image`, `1,200 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float | None) -> str:
    """Formats a fraction in percent: 0.8312 becomes `83.1 %`, None a dash."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 4) -> str:
    """Formats a metric: 0.12345 becomes `0.1235`, 4e34 `4.00e+34`, None a dash."""
    if value is None:
        return MISSING
    # A diverged run's KL has forty digits, none of which says anything.
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.2e}"


def format_bytes(count: int) -> str:
    """Formats a number of bytes in kB, MB or GB (powers of 1000)."""
    # Powers of 1000, as disks and networks count; memory in GiB differs by 7 %.
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1000:,.1f} kB"


def format_value(value: str | float | bool | None) -> str:
    """Formats an option's value; floats get four significant digits, None becomes `none`."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else f"{value}"


def expand_braces(pattern: str) -> Iterator[str]:
    """Spells out `a-{000..002}.tar` and `{train,val}.tar`, as WebDataset does."""
    # Odd pieces are the insides of braces.
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for piece in pieces[1::2]:
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if ends:
            # Padded with zeros only where the first number is, as in a shell.
            width = len(ends[1]) if ends[1].startswith("0") else 0
            choices.append([f"{i:0{width}}" for i in range(int(ends[1]), int(ends[2]) + 1)])
        else:
            choices.append(piece.split(","))
    for chosen in product(*choices):
        yield "".join(a + b for a, b in zip(pieces[::2], [*chosen, ""], strict=True))

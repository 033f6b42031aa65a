"""Defines the errors that users see: what was expected, what was given, where, and what to do next."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]"
)
"""Characters that move a terminal's cursor, colour it, or are invisible; among them the marks of right-to-left text."""
ADDRESS = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*)://([^\s/?#'\"<>]*)([^\s?#'\"<>]*)(\?[^\s#'\"<>]*)?")
"""Scheme, authority, path and query of an address within a text."""
SECRET = re.compile(
    r"x-(amz|goog|oss|cos|ms|obs)-.*|sig|se|sp|sv|sr|st|spr|ske?|sks|skt|skv|skoid|sktid|.*signature.*|expires|policy|"
    r"key|key-pair-id|.*access_?key_?id|googleaccessid|pwd|.*(token|secret|passw|credential|auth|api[_-]?key|session).*",
    re.IGNORECASE,
)
"""Names of parameters that sign an address or give rights."""
LONG = 40
"""Characters from which a parameter's value is taken for a key, whatever it is called."""


class InputError(ValueError):
    """Something the user gave cannot be used; the command line prints the message alone and exits with code 2."""

    # IPython looks for a method of this name before it formats a traceback.
    def _render_traceback_(self) -> list[str]:
        """Returns what a notebook shows in place of a traceback: the message alone."""
        return [f"funmatch: {printable(str(self))}"]


class WorkFailed(Exception):
    """The work ran but produced no result; the command line prints the message alone and exits with code 1."""


# The class's first name, under which users may import and catch it.
Fruitless = WorkFailed


def unknown(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> InputError:
    """Builds the error for an unknown name; it lists the names that are close to it.

    Args:
        kind: what was looked up, in the field's words ("model", "data set").
        name: the name given.
        known: all valid names.
        hint: one more sentence, on what else could have been meant.

    Returns:
        the error, for the caller to raise.
    """
    known = sorted(known)
    lowered = {candidate.lower(): candidate for candidate in known}
    near = [lowered[match] for match in get_close_matches(name.lower(), lowered, n=5, cutoff=0.6)]
    parts = [f"unknown {kind} {name!r}"]
    if near:
        parts.append(f"did you mean {', '.join(map(repr, near))}?")
    # timm alone has over a thousand models; a longer list would push the near names off the screen.
    if len(known) <= 20:
        parts.append(f"known: {', '.join(known)}")
    if hint:
        parts.append(hint)
    return InputError("; ".join(parts))


def some_of(names: Sequence[str], most: int) -> str:
    """Returns the first names of a list for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(text: str) -> str:
    """Returns a text with escapes in place of what would act on a terminal: names of files and classes are data.

    Line breaks and tabs stay, since messages of ours have them.
    """
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), hide_secrets(text))


def hide_secrets(text: str) -> str:
    """Returns a text with the addresses in it as they may be shown and recorded.

    User names and passwords are left out, and so are parameters that sign an address. Long values, which may be keys,
    become a short digest, so that two addresses stay two. Hidden once, a text stays as it is.
    """
    return ADDRESS.sub(_hide, text) if "://" in text else text


def _hide(found: re.Match[str]) -> str:
    scheme, authority, path, query = found.groups()
    of_web = scheme.lower() in ("http", "https")
    user, at, host = authority.rpartition("@")
    name, colon, _ = user.partition(":")
    # Of databases, the user's name alone is kept; of web servers it may be a token.
    kept = f"{name}@" if at and not of_web and not (colon and not name) else ""
    if not at and not re.fullmatch(r"(\[[0-9a-fA-F:.]*\]|[^:]*)(:[0-9]*)?", host):
        # A password with a slash in it: where it ends cannot be known, so all is left out.
        return f"{scheme}://…"
    if not query or not of_web:
        return f"{scheme}://{kept}{host}{path}{query or ''}"
    shown = []
    for each in query[1:].split("&"):
        word, equals, value = each.partition("=")
        if SECRET.fullmatch(word):
            continue
        long = len(value) >= LONG
        shown.append(f"{word}{equals}{hashlib.blake2b(value.encode(), digest_size=4).hexdigest() if long else value}")
    return f"{scheme}://{kept}{host}{path}{'?' if shown else ''}{'&'.join(shown)}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message that is not blank, or the error's class name if there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error reports that an accelerator or the machine is out of memory."""
    # By the name of its class, so that `import funmatch` stays free of torch.
    is_torch_error = type(error).__name__ == "OutOfMemoryError"
    # torch's CPU allocator raises a plain RuntimeError, which only its text tells from others.
    return is_torch_error or isinstance(error, MemoryError) or "can't allocate memory" in str(error)

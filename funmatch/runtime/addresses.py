"""Tells addresses of remote files from paths, and which of them a person has named.

A server is contacted only for an address that a person gave: on the command line, from Python, or in an environment
variable. A file never decides where this machine connects to, whoever wrote it. What is recorded and shown of an
address has no password and no signature (`errors.hide_secrets`); the address as it was given stays in the environment,
where child processes find it.
"""

import os
import re

from funmatch.errors import InputError, hide_secrets

SCHEMES = ("gs", "gcs", "s3", "s3a", "hf", "https", "http", "memory")
"""Kinds of addresses that are read. `memory` is fsspec's, within this process."""
WEB = ("https", "http")
ALLOWED = "FUNMATCH_ALLOW_ADDRESSES"
"""Environment variable with addresses that may be read, a line each; child processes inherit it."""
OFFLINE = "FUNMATCH_OFFLINE"
"""Environment variable that, if it is set, lets no address be contacted: copies are used as they are."""
_ADDRESS = re.compile(rf"(?<![A-Za-z0-9+.-])(?:{'|'.join(SCHEMES)})://.*", re.DOTALL | re.IGNORECASE)


def is_address(text: str) -> bool:
    """Returns whether a text, without any prefix, is an address that can be read."""
    return bool(_ADDRESS.match(text))


def canonical(address: str) -> str:
    """Returns an address with its scheme in small letters: it has no case, but libraries and comparisons know one."""
    scheme, separator, rest = address.partition("://")
    return f"{scheme.lower()}{separator}{rest}"


def scheme_of(address: str) -> str:
    """Returns the scheme of an address, one name for each kind."""
    scheme = address.partition("://")[0].lower()
    return {"gcs": "gs", "s3a": "s3"}.get(scheme, scheme)


def allow(word: str) -> str:
    """Allows the address that a person named in a word, if there is one; returns what stands before it."""
    found = _ADDRESS.search(word)
    if not found:
        return word
    # As it is recorded, an address says nothing of a password that was given with it before.
    if hide_secrets(found[0]) == found[0] and given_address(found[0]):
        return word[: found.start()]
    # The newest first: of one address with two signatures, the last one given counts.
    known = [found[0], *(each for each in _allowed() if each != found[0])]
    os.environ[ALLOWED] = "\n".join(known)
    return word[: found.start()]


def given_address(address: str) -> str | None:
    """Returns an address as a person gave it, with what it needs to be read; None if only a file names it."""
    wanted = hide_secrets(canonical(address))
    return next((each for each in map(canonical, _allowed()) if hide_secrets(each) == wanted), None)


def is_offline() -> bool:
    """Returns whether no address may be contacted."""
    return any(os.environ.get(name, "").lower() in ("1", "on", "true", "yes") for name in (OFFLINE, "HF_HUB_OFFLINE"))


def check_scheme(address: str) -> None:
    """Raises `InputError` for an address of a kind that is not read."""
    if scheme_of(address) == "file":
        raise InputError(f"{address} is an address; pass {address.partition('://')[2]}")
    if not is_address(address):
        raise InputError(
            f"{hide_secrets(address)} is an address of another kind; expected one of "
            f"{', '.join(f'{scheme}://' for scheme in ('gs', 's3', 'hf', 'https', 'http'))}, or a path"
        )


def check_scheme_if_any(text: str) -> None:
    """Raises `InputError` for a text that is an address of a kind that is not read, and no path that exists."""
    if re.match(r"\w+://", text) and not os.path.exists(text):
        check_scheme(text)


def _allowed() -> list[str]:
    return [address for address in os.environ.get(ALLOWED, "").split("\n") if address]

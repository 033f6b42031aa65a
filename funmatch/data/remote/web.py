"""Reads files of web servers: in pieces that resume, and no other file than the one that was looked up."""

import base64
import hashlib
import http.client
import ipaddress
import netrc
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from funmatch.data.remote import checksums
from funmatch.data.remote.objects import Changed, RemoteObject, Unreachable, Wanted, place_of
from funmatch.errors import InputError, first_line, hide_secrets
from funmatch.runtime.addresses import WEB
from funmatch.runtime.log import info
from funmatch.runtime.text import expand_braces
from funmatch.version import __version__

TIMEOUT_SECONDS = 30.0
"""Seconds without a byte after which a connection counts as broken."""
BLOCK = 1 << 20
REDIRECTS = 5
REDIRECTED = (301, 302, 303, 307, 308)
LOOKUPS = 16
"""Files that are looked up at a time."""
HUB = "huggingface.co"
_told: set[tuple[str, str]] = set()
"""Pairs of servers of which this process has said that one leads to the other."""


class WebFiles:
    """Files of web servers, which have no listings: each is named."""

    def find(self, address: str, wanted: Wanted) -> list[RemoteObject]:  # noqa: ARG002
        addresses = list(expand_braces(address))
        for each in addresses:
            _check(each)
        if any("*" in urlsplit(each).path or urlsplit(each).path.endswith("/") for each in addresses):
            raise InputError(
                f"{hide_secrets(address)}: web servers have no listing of their files; name each, as in "
                "https://host/shard-{000..009}.tar, or pass one archive"
            )
        with ThreadPoolExecutor(LOOKUPS) as pool:
            return list(pool.map(self._look_up, addresses))

    def read(self, found: RemoteObject, start: int) -> Iterator[bytes]:
        headers = {}
        if start:
            headers["Range"] = f"bytes={start}-"
            # A weak tag does not stand for the very same bytes.
            if condition := (found.etag if not found.etag.startswith("W/") else "") or found.modified:
                headers["If-Range"] = condition
        with _open(found.address, headers) as response:
            now = _describe(found.address, response)
            if not now.is_version(found.version):
                raise Changed
            # A server without ranges sends the whole again.
            skip = 0 if response.status == 206 else start
            if response.status == 206 and not _starts_at(response, start):
                raise Unreachable("another part was sent than the one that was asked for")
            yield from _blocks(response, skip)

    def digests(self, found: RemoteObject) -> dict[str, str]:
        return found.digests

    def confirm(self, found: RemoteObject) -> None:
        """Nothing to do: each response says which version it is of."""

    def _look_up(self, address: str) -> RemoteObject:
        # Not HEAD: addresses that are signed for reading refuse it, and so do some servers.
        with _open(address, {"Range": "bytes=0-0"}) as response:
            found = _describe(address, response)
            kind = response.headers.get_content_type()
            if kind == "text/html" and not re.search(r"\.x?html?$", urlsplit(address).path):
                raise InputError(
                    f"{found.shown} is a web page, maybe a login; pass the address of the file itself, which a "
                    "browser shows under its download button"
                )
            if found.size is None and response.headers.get("Transfer-Encoding", "").lower() != "chunked":
                raise InputError(
                    f"the server does not say how long {found.shown} is, so a copy that breaks off would pass for "
                    "whole; download it yourself, and pass the file"
                )
            return found


def _check(address: str) -> None:
    """Raises `InputError` for an address that names no server."""
    try:
        parts = urlsplit(address)
        if parts.hostname and (parts.port is None or parts.port > 0):
            return
    except ValueError:
        pass  # a port that is no number, brackets that do not match
    raise InputError(f"{hide_secrets(address)} is not a valid address; expected https://host/path")


def _describe(address: str, response: Any) -> RemoteObject:
    parts, headers = urlsplit(address), response.headers
    host = (parts.hostname or "") + (f":{parts.port}" if parts.port else "")
    # Files that only a query tells apart lie in folders of their own.
    query = urlsplit(hide_secrets(address)).query
    inner = [hashlib.blake2b(query.encode(), digest_size=4).hexdigest()] if query else []
    folder, _, name = unquote(parts.path).strip("/").rpartition("/")
    place = place_of(*filter(None, [host, folder]), *inner, name)
    if place is None:
        raise InputError(f"{hide_secrets(address)} names no file; pass the address of an archive or of shards")
    if response.status == 206:
        total = headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isdecimal() else None
    elif response.status == 416:
        size = 0  # an empty file has no first byte
    else:
        size = int(headers["Content-Length"]) if headers.get("Content-Length", "").isdecimal() else None
    return RemoteObject(
        address, place, size, headers.get("ETag", ""), headers.get("Last-Modified", ""),
        checksums.of_headers(headers, whole=response.status == 200),
    )  # fmt: skip


def _starts_at(response: Any, start: int) -> bool:
    return response.headers.get("Content-Range", "").replace("bytes ", "").startswith(f"{start}-")


def _blocks(response: Any, skip: int) -> Iterator[bytes]:
    try:
        while block := response.read(BLOCK):
            if len(block) > skip:
                yield block[skip:]
            skip = max(0, skip - len(block))
    except (http.client.HTTPException, OSError) as error:
        raise Unreachable(_reason(error)) from error


def _open(address: str, headers: dict[str, str]) -> Any:
    """Opens an address.

    Raises:
        InputError: the server refuses, or leads elsewhere.
        Unreachable: it does not respond, or asks to come back later.
    """
    plain, own = _credentials(address)
    # Compressed on the way, a file would have another length and other ranges.
    headers = {"User-Agent": f"funmatch/{__version__}", "Accept-Encoding": "identity", **own, **headers}
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(), _Redirects(address), urllib.request.HTTPErrorProcessor(),
    ):  # fmt: skip
        opener.add_handler(handler)
    try:
        return opener.open(urllib.request.Request(plain, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and headers.get("Range") == "bytes=0-0":
            return error  # it is a response, too
        error.close()
        raise _refusal(address, error) from None
    except InputError:
        raise
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise InputError(
                f"{hide_secrets(address)}: the server's certificate is not trusted ({first_line(reason)}); check the "
                "address, and this machine's clock and certificates"
            ) from None
        if isinstance(error, ValueError | http.client.InvalidURL):
            raise InputError(f"{hide_secrets(address)} is not a valid address") from None
        raise Unreachable(_reason(reason)) from error


def _refusal(address: str, error: urllib.error.HTTPError) -> Exception:
    shown, said = hide_secrets(address), f"{error.code} {error.reason}".strip().partition("\n")[0]
    if error.code in (401, 403, 407):
        host = urlsplit(address).hostname
        return InputError(
            f"{shown}: the server refuses it ({said}); a signed address may have expired: get a new one. For a login, "
            f"write the user and password of {host} into ~/.netrc"
        )
    if error.code in (404, 410):
        return InputError(f"{shown}: there is no such file ({said}); check the address")
    if error.code in REDIRECTED:
        place = error.headers.get("Location", "")
        if not place:
            return InputError(f"{shown} cannot be read: it leads elsewhere without saying where; check it")
        where = f"leads to {hide_secrets(place.partition('?')[0])}"
        if urlsplit(place).scheme not in ("", "http", "https"):
            return InputError(f"{shown} {where}, which is not on a web server; pass another address")
        return InputError(
            f"{shown} leads from one address to the next, in a circle or more than {REDIRECTS} times; the last one "
            f"{where}; maybe it needs a login; pass the address of the file itself"
        )
    if error.code in (408, 425, 429) or error.code >= 500:
        return Unreachable(said)
    return InputError(f"{shown} cannot be read: {said}")


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was cut"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error) if isinstance(error, BaseException) else str(error)


def _credentials(address: str) -> tuple[str, dict[str, str]]:
    """Returns an address without its user and password, and the header that stands for them.

    They are those in the address, else those of the host in ~/.netrc; for the Hugging Face Hub, its token.
    """
    parts = urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    plain = urlunsplit(parts._replace(netloc=host, fragment="", path=quote(parts.path, "/%:@!$&'()*+,;=~")))
    if at:
        return plain, _basic(unquote(user))
    if parts.hostname == HUB and parts.scheme == "https":
        from huggingface_hub import get_token

        token = get_token()
        return plain, {"Authorization": f"Bearer {token}"} if token else {}
    # Never unencrypted, unless it is asked for by the address itself.
    if parts.scheme == "https" and parts.hostname:
        try:
            known = netrc.netrc().authenticators(parts.hostname)
        except (OSError, netrc.NetrcParseError):
            known = None
        if known:
            return plain, _basic(f"{known[0]}:{known[2]}")
    return plain, {}


def _basic(user: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to another one by HTTPS alone, without credentials, and says so."""

    max_redirections = REDIRECTS

    def __init__(self, address: str) -> None:
        self.address = address

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        shown, target = hide_secrets(self.address), hide_secrets(newurl)
        if new.scheme not in WEB:
            raise InputError(f"{shown} leads to {target}, which is not on a web server; pass another address")
        if (old.scheme, new.scheme) == ("https", "http"):
            raise InputError(f"{shown} leads to {target}, which is not encrypted; if you trust it, pass that address")
        if new.hostname != old.hostname:
            # A public server must not make this machine read what only its own network can.
            if _is_private(new.hostname) and not _is_private(old.hostname):
                raise InputError(
                    f"{shown} leads to {target}, which is in this machine's own network; if you trust it, pass that "
                    "address"
                )
            pair = (str(old.hostname), str(new.hostname))
            if pair not in _told:
                _told.add(pair)
                info(f"{shown}: {pair[0]} leads to {pair[1]}, which is read instead")
        found = super().redirect_request(req, fp, code, msg, headers, newurl)
        if found and (new.scheme, new.netloc) != (old.scheme, old.netloc):
            found.remove_header("Authorization")
        return found


def _is_private(host: str | None) -> bool:
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False  # it cannot be reached either
    return any(not ipaddress.ip_address(each[4][0]).is_global for each in found)

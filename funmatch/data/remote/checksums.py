"""Reads the checksums that servers and buckets announce of files, and compares copies with them."""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from email.message import Message
from pathlib import Path
from typing import Any

from funmatch.data.formats.crc32c import crc32c
from funmatch.runtime.disk.checksums import crc_of_file

BLOCK = 1 << 20
MD5 = re.compile(r'"?([0-9a-f]{32})"?')
"""A tag of S3 that is a checksum: of a file in several parts it has their number behind it."""
NAMES = {"md5": "md5", "sha-256": "sha256", "crc32c": "crc32c"}
"""Names of algorithms in headers, and their names here."""
GOOGLE = {"md5": "md5Hash", "crc32c": "crc32c"}
AMAZON = {"sha256": "SHA256", "sha1": "SHA1", "crc32c": "CRC32C", "crc32": "CRC32"}


def of_headers(headers: Message, *, whole: bool) -> dict[str, str]:
    """Returns the checksums of a whole file that a response of a web server announces, in hexadecimal.

    Args:
        headers: of the response.
        whole: whether it is of the whole file; those of a part say the checksums of the whole, but Amazon's.
    """
    # x-goog-hash is Google Cloud Storage's own header; Repr-Digest is the standard's (RFC 9530). The first is of the
    # file as it is stored there, and says nothing of one that the server unpacks on the way.
    stored, sent = (headers.get(f"{each}Content-Encoding", "identity") for each in ("x-goog-stored-", ""))
    lines = (headers.get_all("x-goog-hash") or []) if stored == sent else []
    lines = [*lines, headers.get("Repr-Digest", "")]
    announced = [item.strip().partition("=") for line in lines for item in line.split(",")]
    found = {NAMES[name.lower()]: value.strip(":") for name, _, value in announced if name.lower() in NAMES}
    if headers.get("x-amz-checksum-type", "").upper() != "COMPOSITE" and whole:
        found |= {name: headers[f"x-amz-checksum-{name}"] for name in AMAZON if headers.get(f"x-amz-checksum-{name}")}
    tag = headers.get("ETag", "") if headers.get("Server") == "AmazonS3" else ""
    return _decoded(found) | _of_tag(tag, headers.get("x-amz-server-side-encryption", ""))


def of_s3(head: Mapping[str, Any]) -> dict[str, str]:
    """Returns the checksums that S3 announces of an object, in hexadecimal; `head` as `head_object` returns it."""
    composite = head.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT"
    found = {} if composite else {name: head.get(f"Checksum{key}") for name, key in AMAZON.items()}
    named = {name: value for name, value in found.items() if value}
    # Encrypted by a customer's own key, a tag is none either.
    encryption = head.get("ServerSideEncryption", head.get("SSECustomerAlgorithm") and "customer") or ""
    return _decoded(named) | _of_tag(head.get("ETag", ""), encryption)


def of_google(about: Mapping[str, Any]) -> dict[str, str]:
    """Returns the checksums that Google Cloud Storage announces of an object, in hexadecimal."""
    # Of an object that it unpacks on the way, they are those of what is stored.
    if about.get("contentEncoding", "identity") not in ("", "identity"):
        return {}
    return _decoded({name: about[key] for name, key in GOOGLE.items() if about.get(key)})


def _of_tag(tag: str, encryption: str) -> dict[str, str]:
    """Returns the MD5 that a tag of S3 is; nothing where the encryption with a key of its own makes it another text."""
    found = MD5.fullmatch(tag)
    return {"md5": found[1]} if found and encryption in ("", "AES256") else {}


def _decoded(announced: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, value in announced.items():
        try:
            found[name] = base64.b64decode(value, validate=True).hex()
        except ValueError:
            continue  # not a checksum, whatever it is called
    return found


def difference(path: Path, digests: Mapping[str, str]) -> str:
    """Returns how a file differs from its checksums, as a clause; an empty string where it does not.

    Args:
        path: of the file.
        digests: in hexadecimal, by `hashlib`'s name of the algorithm, or crc32 or crc32c.
    """
    # One that hashlib computes says all; CRC-32C takes longer without a library.
    strong = {name: value for name, value in digests.items() if name in hashlib.algorithms_available}
    for name, expected in (strong or digests).items():
        if (digest := _digest(path, name)) != expected.lower():
            return f"its {name.upper()} is {digest}, not {expected}"
    return ""


def _digest(path: Path, name: str) -> str:
    if name == "crc32":
        return f"{crc_of_file(path):08x}"
    with open(path, "rb") as file:
        if name != "crc32c":
            return hashlib.file_digest(file, name).hexdigest()
        crc = 0
        for block in _blocks(file):
            crc = crc32c(block, crc)
        return f"{crc:08x}"


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block

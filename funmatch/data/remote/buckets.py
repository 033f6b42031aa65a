"""Reads files of buckets (Google Cloud Storage, S3, the Hugging Face Hub) through fsspec."""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

from funmatch.data.remote import checksums
from funmatch.data.remote.objects import Changed, RemoteObject, Unreachable, Wanted, place_of
from funmatch.errors import InputError, first_line, hide_secrets
from funmatch.runtime.addresses import scheme_of
from funmatch.runtime.log import info
from funmatch.runtime.text import expand_braces

BLOCK = 8 << 20
LIBRARIES = {"gs": ("gcsfs", "gs"), "s3": ("s3fs", "s3")}
"""Libraries that are extras: their names, and the extras'."""
MAGIC = re.compile(r"[*?[]")
# The generation first: Google's tag changes with the rights to an object, too.
VERSIONS = ("generation", "ETag", "etag", "md5Hash", "blob_id", "xet_hash")
TIMES = ("LastModified", "last_modified", "mtime", "updated", "created", "last_commit")
LOGIN = {
    "gs": "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "log in with `aws configure` or `aws sso login`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "hf": "log in with `hf auth login`, or set HF_TOKEN",
}
"""Where credentials come from; they are never options of ours."""
REFUSED = re.compile(
    r"permission|forbidden|access ?denied|unauthorized|credential|expired|invalid ?access|signature|gated|"
    r"not authorized|anonymous caller|refresh ?error|\b40[13]\b|InvalidToken|TokenRefresh",
    re.IGNORECASE,
)
MISSING = re.compile(r"FileNotFound|NotFoundError|NoSuch(Bucket|Key)|\b404\b|bucket does not exist", re.IGNORECASE)
BROKEN = re.compile(
    r"timeout|timed ?out|connect|resolve|disconnected|payload|unreachable|temporar|offline|slow ?down|name or service|"
    r"\b(429|50[0234])\b|transport ?error|InternalError|ServiceUnavailable|IncompleteRead|LocalEntryNotFound",
    re.IGNORECASE,
)


class BucketFiles:
    """Files of one kind of bucket."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.files = _open(scheme, anonymous=False)

    def find(self, address: str, wanted: Wanted) -> list[RemoteObject]:
        # A listing that was read before may be outdated.
        self.files.invalidate_cache()
        listed: list[dict[str, Any]] = []
        for each in expand_braces(address):
            listed += self._tried(each, lambda each=each: self._find(each, wanted))
        # A folder is an entry with a slash at the end in some buckets.
        listed = [one for one in listed if one["type"] == "file" and not one["name"].endswith("/")]
        if not listed:
            raise InputError(f"{hide_secrets(address)}: no file is there, or none with this name; check the address")
        objects = [self._describe(address, about) for about in (*listed, *self._beside(listed, wanted))]
        found = {one.place: one for one in objects}
        return [found[place] for place in sorted(found)]

    def read(self, found: RemoteObject, start: int) -> Iterator[bytes]:
        size = found.size
        if size is None:
            raise InputError(f"{found.shown}: its size is unknown, so a copy that breaks off would pass for whole")
        while start < size:
            # By name: s3fs has another order of arguments.
            bounds = {"start": start, "end": min(size, start + BLOCK)}
            block = self._tried(found.address, lambda bounds=bounds: self.files.cat_file(found.address, **bounds))
            if not block:
                raise Changed  # it is shorter than it was
            start += len(block)
            yield block

    def digests(self, found: RemoteObject) -> dict[str, str]:
        if self.scheme != "s3":
            return found.digests
        # Listings do not say how a file is encrypted, which decides whether its tag is a checksum.
        bucket, _, key = found.address.partition("://")[2].partition("/")
        try:
            head = self.files.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        except Exception:  # any of the library; a bucket that does not say it is read without
            return {}
        if found.etag and head.get("ETag", "").strip('"') != found.etag.strip('"'):
            raise Changed
        return checksums.of_s3(head)

    def confirm(self, found: RemoteObject) -> None:
        self.files.invalidate_cache()
        now = self._tried(found.address, lambda: self.files.info(found.address))
        if not self._describe(found.address, now).is_version(found.version):
            raise Changed

    def _find(self, address: str, wanted: Wanted) -> list[dict[str, Any]]:
        if MAGIC.search(address.partition("://")[2]):
            return [*self.files.glob(address, detail=True).values()]
        about = self.files.info(address)
        if about["type"] != "directory":
            return [about]
        inside = self.files.find(address, detail=True).values()
        return [one for one in inside if wanted.counts(one["name"].rpartition("/")[2])]

    def _beside(self, listed: list[dict[str, Any]], wanted: Wanted) -> Iterator[dict[str, Any]]:
        """Yields the files beside others, and in the folder above, that are read, too."""
        if not wanted.beside:
            return
        folders = {one["name"].rpartition("/")[0] for one in listed}
        for folder in sorted(folders | {each.rpartition("/")[0] for each in folders} - {""}):
            # They may be missing, and so may the right to list: names of classes can be given otherwise.
            with suppress(Exception):
                for one in self.files.ls(f"{self.scheme}://{folder.lstrip('/')}", detail=True):
                    if one["type"] == "file" and wanted.is_beside(one["name"].rpartition("/")[2]):
                        yield one

    def _describe(self, address: str, about: dict[str, Any]) -> RemoteObject:
        # Some file systems begin names with a slash, which is no part of them.
        name = str(about["name"]).removeprefix(f"{self.scheme}://").lstrip("/")
        place = place_of(name)
        if place is None:
            raise InputError(
                f"{hide_secrets(address)}: the name {name!r} cannot be a file's on this machine; rename it there, or "
                "name the others"
            )
        digests = {}
        if isinstance(lfs := about.get("lfs"), dict) and lfs.get("sha256"):
            digests["sha256"] = str(lfs["sha256"])
        elif getattr(lfs, "sha256", None):
            digests["sha256"] = str(lfs.sha256)
        if self.scheme == "gs":
            digests = checksums.of_google(about)
        etag = next((str(about[key]) for key in VERSIONS if about.get(key)), "")
        time = next((about[key] for key in TIMES if about.get(key)), "")
        # Listings may hold it as a text, and single look-ups as an object.
        modified = time.isoformat() if isinstance(time, datetime) else str(time)
        return RemoteObject(f"{self.scheme}://{name}", place, about.get("size"), etag, modified, digests)

    def _tried(self, address: str, action: Any) -> Any:
        try:
            return action()
        except InputError:
            raise
        except Exception as error:  # each library raises types of its own
            # Public buckets need no login, and S3's library does not try without one.
            if type(error).__name__ != "NoCredentialsError" or getattr(self.files, "anon", True):
                raise explain(error, address) from error
        # Behind the handler, whose error would be in the chain of the next one, and pass for its cause.
        info(f"{hide_secrets(address)}: there are no credentials for S3 here; reading without any")
        self.files = _open(self.scheme, anonymous=True)
        return self._tried(address, action)


@lru_cache
def _open(scheme: str, *, anonymous: bool) -> Any:
    import fsspec

    options: dict[str, Any] = {"anon": True} if anonymous else {}
    if scheme == "s3":
        # What breaks is tried again here, with a line that says so.
        options["config_kwargs"] = {"connect_timeout": 20, "read_timeout": 60, "retries": {"max_attempts": 2}}
    # Its log shows the traceback of what is raised as well, and said in a line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        library, extra = LIBRARIES.get(scheme, (scheme, scheme))
        raise InputError(
            f"{scheme}:// needs the library {library}; pip install 'funmatch[{extra}]' ({first_line(error)})"
        ) from None
    except Exception as error:  # credentials are looked for at once
        raise explain(error, f"{scheme}://") from error


def explain(error: Exception, address: str) -> Exception:
    """Returns the error that a library's error of a bucket is: `InputError`, or `Unreachable`."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain and len(chain) < 8:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    # Types first: a message may hold any word, such as the name of a bucket.
    names = " ".join(f"{kind.__name__}" for each in chain for kind in type(each).__mro__)
    codes = " ".join(str(_status(each)) for each in chain)
    said, shown = hide_secrets(first_line(error)), hide_secrets(address)
    login = LOGIN.get(scheme_of(address), "check the credentials")
    for text in (codes, names, " ".join(map(str, chain))):
        if REFUSED.search(text):
            return InputError(
                f"{shown} is refused ({said}); the credentials of this machine are missing, expired, or lack the right "
                f"to read or to list it: {login}. Without the right to list, name each file: shard-{{000..009}}.tar"
            )
        if MISSING.search(text):
            return InputError(f"{shown}: there is no such file or bucket ({said}); check the address")
        if BROKEN.search(text):
            return Unreachable(said)
    return InputError(f"{shown} cannot be read: {said}; check the address and the credentials ({login})")


def _status(error: BaseException) -> object:
    response = getattr(error, "response", None)
    # botocore's responses are dictionaries, those of other libraries objects.
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
    return getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", "")

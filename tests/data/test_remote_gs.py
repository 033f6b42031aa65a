"""Images in buckets of Google Cloud Storage, through gcsfs and a server of its JSON interface on this machine."""

import base64
import hashlib
import json
import re
from importlib.util import find_spec
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from test_remote import ask_again, jpeg_files, opened, tar_of  # noqa: F401
from web_server import WebServer, serve

from funmatch.data.readers.open import open_dataset
from funmatch.data.remote import buckets
from funmatch.errors import InputError
from funmatch.runtime import addresses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the libraries' own
    pytest.mark.skipif(not find_spec("gcsfs"), reason="needs gcsfs"),
]


class Bucket(dict):
    """Objects by their names, each with a generation."""

    def __init__(self) -> None:
        self.generation, self.generations, self.listable = 0, {}, True

    def __setitem__(self, name: str, content: bytes) -> None:
        self.generation += 1
        self.generations[name] = self.generation
        super().__setitem__(name, content)

    def about(self, name: str) -> dict:
        content = self[name]
        return {
            "kind": "storage#object", "name": name, "bucket": "pets", "size": str(len(content)),
            "generation": str(self.generations[name]), "updated": "2026-01-01T00:00:00.000Z",
            "etag": f"tag{self.generations[name]}", "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        }  # fmt: skip

    def respond(self, handler) -> None:
        parts = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        found = re.fullmatch(r"/(?:download/)?(?:storage/v1/)?b/([^/]+)/o/?([^/]*)", parts.path)
        bucket, name = (found[1], unquote(found[2])) if found else ("", "")
        if bucket != "pets" or (name and name not in self):
            self.send(handler, 404, json.dumps({"error": {"code": 404, "message": "Not Found"}}).encode())
        elif not name and not self.listable:
            text = "me@example.org does not have storage.objects.list access to the Google Cloud Storage bucket."
            self.send(handler, 403, json.dumps({"error": {"code": 403, "message": text}}).encode())
        elif not name:
            prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
            names = [each for each in sorted(self) if each.startswith(prefix)]
            inner = {each: each[len(prefix) :].partition(delimiter)[0] for each in names} if delimiter else {}
            folders = {f"{prefix}{inner[each]}/" for each in names if delimiter and delimiter in each[len(prefix) :]}
            items = [self.about(each) for each in names if not any(each.startswith(folder) for folder in folders)]
            self.send(handler, 200, json.dumps({"items": items, "prefixes": sorted(folders)}).encode())
        elif query.get("alt") == "media" or parts.path.startswith("/download"):
            content, asked = self[name], re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
            self.send(handler, 206 if asked else 200, content[int(asked[1]) : int(asked[2]) + 1] if asked else content)
        else:
            self.send(handler, 200, json.dumps(self.about(name)).encode())

    def send(self, handler, status: int, content: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        handler.wfile.write(content)


@pytest.fixture(name="bucket")
def bucket_of_a_server(tmp_path, monkeypatch):
    import gcsfs

    bucket = Bucket()
    with serve(lambda handler: bucket.respond(handler)) as server:
        assert isinstance(server, WebServer)
        for name, value in {
            "STORAGE_EMULATOR_HOST": server.address, "FUNMATCH_CACHE": str(tmp_path / "cache"), addresses.ALLOWED: "",
            "HF_HUB_OFFLINE": "", "FSSPEC_GS_TOKEN": "anon", "FSSPEC_GCS_TOKEN": "anon",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        buckets._open.cache_clear()
        gcsfs.GCSFileSystem.clear_instance_cache()
        ask_again()
        yield bucket
    buckets._open.cache_clear()


def test_folders_patterns_and_changes(bucket, tmp_path, jpegs):
    for i, jpeg in enumerate(jpegs):
        bucket[f"images/train/{'cat' if i % 2 else 'dog'}/{i}.jpg"] = jpeg
    bucket["w/train-000.tar"] = tar_of(tmp_path, jpegs[:4])
    bucket["w/classes.txt"] = b"cat\ndog\n"
    found = opened("gs://pets/images")
    assert (found.classes, len(found.splits["train"])) == (("cat", "dog"), 6)
    assert opened("wds:gs://pets/w/*.tar").classes == ("cat", "dog")
    bucket["w/train-000.tar"] = tar_of(tmp_path, jpegs[:3])
    ask_again()
    assert len(opened("wds:gs://pets/w/*.tar").splits["train"]) == 3


def test_errors(bucket, tmp_path, jpegs):
    bucket["w/train-000.tar"] = tar_of(tmp_path, jpegs)
    for spec in ("wds:gs://pets/none.tar", "wds:gs://nobucket/a.tar"):
        addresses.allow(spec)
        with pytest.raises(InputError, match=r"gs://\w+/\w+\.tar: there is no such file or bucket"):
            open_dataset(spec)
    bucket.listable = False
    addresses.allow("wds:gs://pets/w/*.tar")
    with pytest.raises(InputError, match=r"is refused .*gcloud auth.*name each file: shard-\{000\.\.009\}\.tar"):
        open_dataset("wds:gs://pets/w/*.tar")

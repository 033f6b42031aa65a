"""Checksums of servers, addresses in capital letters, and class names at an address."""

import base64
import hashlib
import json
import zlib
from email.message import Message

import pytest
from test_remote import ask_again, jpeg_files, memory_bucket, opened, own_cache, running_server, tar_of  # noqa: F401
from web_server import WebServer

from funmatch.config import Prepare
from funmatch.data.dataset import ReadOptions
from funmatch.data.readers.open import open_dataset, resolve_spec
from funmatch.data.remote import checksums
from funmatch.data.remote.single import local_file
from funmatch.errors import InputError
from funmatch.runtime import addresses
from funmatch.shipping.sources.find import find_images

CONTENT = b"123456789"
CRC32C = "e3069283"
"""Of `CONTENT`, as the catalogues of checksums say."""


def base64_of(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()


MD5 = hashlib.md5(CONTENT).hexdigest()
SHA = hashlib.sha256(CONTENT).hexdigest()
CRC = f"{zlib.crc32(CONTENT):08x}"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"x-goog-hash": f"crc32c={base64_of(CRC32C)},md5={base64_of(MD5)}"}, {"md5": MD5, "crc32c": CRC32C}),
        ({"x-goog-hash": f"crc32c={base64_of(CRC32C)}"}, {"crc32c": CRC32C}),
        ({"x-goog-hash": f"md5={base64_of(MD5)}", "x-goog-stored-content-encoding": "gzip"}, {}),
        ({"Repr-Digest": f"sha-256=:{base64_of(SHA)}:"}, {"sha256": SHA}),
        ({"Server": "AmazonS3", "ETag": f'"{MD5}"'}, {"md5": MD5}),
        ({"Server": "AmazonS3", "ETag": f'"{MD5}"', "x-amz-server-side-encryption": "AES256"}, {"md5": MD5}),
        # Tags that are no checksums: of several parts, of an encryption with a key of its own, of other servers.
        ({"Server": "AmazonS3", "ETag": f'"{MD5}-3"'}, {}),
        ({"Server": "AmazonS3", "ETag": f'"{MD5}"', "x-amz-server-side-encryption": "aws:kms"}, {}),
        ({"Server": "nginx", "ETag": f'"{MD5}"'}, {}),
        ({"x-amz-checksum-sha256": base64_of(SHA)}, {"sha256": SHA}),
        ({"x-amz-checksum-crc32c": base64_of(CRC32C), "x-amz-checksum-crc32": base64_of(CRC)},
         {"crc32c": CRC32C, "crc32": CRC}),
        ({"x-amz-checksum-crc32": f"{base64_of(CRC)}-2", "x-amz-checksum-type": "COMPOSITE"}, {}),
        ({"x-goog-hash": "md5=not a checksum"}, {}),
        ({}, {}),
    ],
)  # fmt: skip
def test_checksums_of_responses(tmp_path, headers, expected):
    message = Message()
    for name, value in headers.items():
        message[name] = value
    found = checksums.of_headers(message, whole=True)
    assert found == expected
    (tmp_path / "file").write_bytes(CONTENT)
    assert checksums.difference(tmp_path / "file", found) == ""
    (tmp_path / "file").write_bytes(CONTENT[::-1])
    assert bool(checksums.difference(tmp_path / "file", found)) == bool(expected)


def test_checksums_of_a_part_are_not_taken_for_those_of_the_file():
    message = Message()
    message["x-amz-checksum-sha256"] = base64_of(SHA)
    assert checksums.of_headers(message, whole=False) == {}


def test_checksums_of_buckets():
    about = {"md5Hash": base64_of(MD5), "crc32c": base64_of(CRC32C)}
    assert checksums.of_google(about) == {"md5": MD5, "crc32c": CRC32C}
    assert checksums.of_google(about | {"contentEncoding": "gzip"}) == {}
    assert checksums.of_s3({"ETag": f'"{MD5}"', "ServerSideEncryption": "AES256"}) == {"md5": MD5}
    assert checksums.of_s3({"ETag": f'"{MD5}"', "SSECustomerAlgorithm": "AES256", "SSECustomerKeyMD5": "x"}) == {}
    assert checksums.of_s3({"ETag": f'"{MD5}-2"', "ChecksumSHA256": base64_of(SHA)}) == {"sha256": SHA}
    assert checksums.of_s3({"ChecksumCRC32": base64_of(CRC), "ChecksumType": "COMPOSITE"}) == {}


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_file_that_arrives_damaged_is_read_once_more(web_files: WebServer, tmp_path, jpegs, capsys, damaged):
    content = tar_of(tmp_path, jpegs)
    web_files.tags = False
    web_files.more["x-goog-hash"] = f"md5={base64_of(hashlib.md5(content).hexdigest())}"
    answers = [content, *[content[:700] + b"?" + content[701:]] * damaged, content]

    def next_answer(path: str) -> None:
        web_files.files[path] = answers.pop(0)

    web_files.files["/train.tar"] = content
    web_files.on_request = next_answer
    spec = f"wds:{web_files.address}/train.tar"
    if damaged > 1:
        with pytest.raises(InputError, match=r"train\.tar arrived damaged twice \(its MD5 is .*compare it with"):
            opened(spec)
        assert not [*(tmp_path / "cache").rglob("train.tar")]
        return
    opened(spec)
    assert next((tmp_path / "cache/remote").rglob("train.tar")).read_bytes() == content
    said = capsys.readouterr().err.replace("\n", " ")
    assert "arrived damaged (its MD5 is" in said
    assert "downloading it again" in said


def test_schemes_have_no_case(web_files: WebServer, tmp_path, jpegs, memory):
    web_files.files["/a/train.tar"] = tar_of(tmp_path, jpegs)
    web_files.files["/photo.jpg"] = jpegs[0]
    host = web_files.address.removeprefix("http://")
    spec, capital = f"wds:http://{host}/a/train.tar", f"wds:HTTP://{host}/a/train.tar"
    assert resolve_spec(capital) == resolve_spec(spec) == spec
    assert opened(capital).key == opened(spec).key
    # The copy of the one is that of the other.
    assert web_files.bytes_asked() == [""]
    photo = f"Http://{host}/photo.jpg"
    addresses.allow(photo)
    (image,) = find_images([photo], ReadOptions(), "train").images
    assert image.read() == jpegs[0]
    for i, jpeg in enumerate(jpegs):
        memory.pipe(f"/pets/train/{'cat' if i % 2 else 'dog'}/{i}.jpg", jpeg)
    assert opened("MEMORY://pets").classes == ("cat", "dog")
    with pytest.raises(InputError, match=r"FILE:///x is an address; pass /x"):
        opened("FILE:///x")


def test_class_names_at_an_address(web_files: WebServer, tmp_path, jpegs, funmatch):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/train.tar").write_bytes(tar_of(tmp_path, jpegs))
    spec, names = f"wds:{tmp_path}/shards/train.tar", f"{web_files.address}/names.txt?token=secret"
    web_files.files["/names.txt"] = b"wren\nheron\n"
    words = ["prepare", spec, "--class-file", names, "--json"]
    # As the command line does; the fixture's words are of no person.
    addresses.allow(names)
    printed = funmatch(*words)
    assert json.loads(printed.stdout)["classes"] == ["wren", "heron"]
    assert "secret" not in printed.stdout + printed.stderr
    assert Prepare.checked(data=spec, class_file=names).class_file == f"{web_files.address}/names.txt"
    path = local_file(names)
    assert path
    assert open_dataset(spec, ReadOptions(class_file=path)).classes == ("wren", "heron")
    # Named for one command, it names the classes of no other shards there.
    web_files.files["/train.tar"] = (tmp_path / "shards/train.tar").read_bytes()
    web_files.files["/classes.txt"] = b"wren\nheron\n"
    addresses.allow(f"{web_files.address}/classes.txt")
    assert local_file(f"{web_files.address}/classes.txt")
    addresses.allow(f"wds:{web_files.address}/train.tar")
    assert open_dataset(f"wds:{web_files.address}/train.tar").classes == ("0", "1")
    web_files.files["/names.txt"] = b"wren\nowl\n"
    ask_again()
    assert json.loads(funmatch(*words).stdout)["classes"] == ["wren", "owl"]


def test_an_address_of_class_names_that_only_a_file_names_is_not_asked(web_files: WebServer, tmp_path, jpegs, funmatch):
    (tmp_path / "train.tar").write_bytes(tar_of(tmp_path, jpegs))
    web_files.files["/names.txt"] = b"wren\nheron\n"
    options = tmp_path / "options.toml"
    options.write_text(f'class-file = "{web_files.address}/names.txt"\n')
    refused = funmatch("prepare", f"wds:{tmp_path}/train.tar", "--config", options, check=2)
    assert "is an address that a file names" in refused.stderr
    assert web_files.requests == []


def test_an_address_of_several_files_holds_no_class_names(memory):
    memory.pipe("/pets/a.txt", b"a\n")
    memory.pipe("/pets/b.txt", b"b\n")
    for place in ("memory://pets", "memory://pets/*.txt"):
        addresses.allow(place)
        with pytest.raises(InputError, match="is not one file; pass the address of a file"):
            local_file(place)

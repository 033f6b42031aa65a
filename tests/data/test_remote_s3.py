"""Images in buckets of S3, through s3fs and the server of moto on this machine (`moto[s3]`, flask and flask-cors)."""

import os
import urllib.request

import pytest
from test_remote import ask_again, jpeg_files, opened, tar_of  # noqa: F401

from funmatch.data.readers.open import open_dataset
from funmatch.data.remote import buckets, download, fetch
from funmatch.errors import InputError
from funmatch.runtime import addresses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the libraries' own
]


@pytest.fixture(name="s3")
def client_of_a_server(tmp_path, monkeypatch):
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true", "FUNMATCH_CACHE": str(tmp_path / "cache"),
        addresses.ALLOWED: "", "HF_HUB_OFFLINE": "", "HOME": str(tmp_path),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    ask_anew(s3fs)
    # All servers of a process share their objects.
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="pets")
    yield client
    server.stop()


def ask_anew(s3fs):
    """As a process that has just begun."""
    buckets._open.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    fetch._checked.clear()


def test_folders_shards_and_changes(s3, tmp_path, jpegs):
    for i, jpeg in enumerate(jpegs):
        s3.put_object(Bucket="pets", Key=f"images/train/{'cat' if i % 2 else 'dog'}/{i}.jpg", Body=jpeg)
    for i in range(2):
        s3.put_object(Bucket="pets", Key=f"w/train-{i:03}.tar", Body=tar_of(tmp_path, jpegs[3 * i : 3 * i + 3]))
    s3.put_object(Bucket="pets", Key="w/classes.txt", Body=b"cat\ndog\n")
    found = opened("s3://pets/images")
    assert (found.classes, found.name, len(found.splits["train"])) == (("cat", "dog"), "images", 6)
    keys = {opened(f"wds:s3://pets/w{names}").key for names in ("/*.tar", "", "/train-{000..001}.tar")}
    assert len(keys) == 1
    s3.put_object(Bucket="pets", Key="w/train-001.tar", Body=tar_of(tmp_path, jpegs[3:5]))
    s3.delete_object(Bucket="pets", Key="images/train/dog/0.jpg")
    ask_again()
    assert len(opened("wds:s3://pets/w/*.tar").splits["train"]) == 5
    assert len(opened("s3://pets/images").splits["train"]) == 5


def test_a_large_object_comes_in_pieces_of_one_version(s3, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    content = os.urandom(3 * buckets.BLOCK - 7)
    s3.put_object(Bucket="pets", Key="big.bin", Body=content)
    addresses.allow("s3://pets/big.bin")
    read, pieces = buckets.BucketFiles.read, []

    def cut(self, found, start):
        for block in read(self, found, start):
            pieces.append(start)
            yield block
            if len(pieces) == 1:
                raise buckets.Unreachable("read timed out")

    monkeypatch.setattr(buckets.BucketFiles, "read", cut)
    with pytest.raises(InputError, match=rf"{buckets.BLOCK:,} of {len(content):,} bytes are kept"):
        fetch.fetch("s3://pets/big.bin", fetch.EVERYTHING)
    found = fetch.fetch("s3://pets/big.bin", fetch.EVERYTHING)
    assert pieces == [0, buckets.BLOCK, buckets.BLOCK]
    assert found.files[0].read_bytes() == content
    other = os.urandom(len(content))

    def change(self, found, start):
        for block in read(self, found, start):
            yield block
            s3.put_object(Bucket="pets", Key="big.bin", Body=other)

    s3.put_object(Bucket="pets", Key="big.bin", Body=content[::-1])
    monkeypatch.setattr(buckets.BucketFiles, "read", change)
    with pytest.raises(InputError, match=r"s3://pets/big\.bin has changed while it was read"):
        fetch.fetch("s3://pets/big.bin", fetch.EVERYTHING, refresh=True)


def test_errors_and_no_network(s3, tmp_path, jpegs, monkeypatch, capsys):
    import s3fs

    s3.put_object(Bucket="pets", Key="w/train.tar", Body=tar_of(tmp_path, jpegs))
    key = opened("wds:s3://pets/w/*.tar").key
    for spec, message in {
        "wds:s3://pets/none.tar": r"s3://pets/none\.tar: there is no such file or bucket",
        "wds:s3://pets/none/*.tar": "no file is there, or none with this name",
        "wds:s3://nobucket/a.tar": r"s3://nobucket/a\.tar: there is no such file or bucket",
    }.items():
        addresses.allow(spec)
        with pytest.raises(InputError, match=message):
            open_dataset(spec)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    ask_anew(s3fs)
    assert opened("wds:s3://pets/w/*.tar").key == key
    assert "using the copy of" in capsys.readouterr().err
    addresses.allow("wds:s3://pets/x/*.tar")
    with pytest.raises(InputError, match=r"s3://pets/x/\*\.tar cannot be reached: Could not connect"):
        open_dataset("wds:s3://pets/x/*.tar")


def test_rights_and_missing_credentials(s3, tmp_path, jpegs, monkeypatch, capsys):
    import s3fs
    from botocore.exceptions import ClientError

    content = tar_of(tmp_path, jpegs)
    s3.put_object(Bucket="pets", Key="w/train.tar", Body=content, ACL="public-read")
    s3.put_object(Bucket="pets", Key="w/own.tar", Body=content)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    ask_anew(s3fs)
    # What is public is read without any.
    assert len(opened("wds:s3://pets/w/train.tar").splits["train"]) == 6
    assert "there are no credentials for S3 here; reading without any" in capsys.readouterr().err

    # Without a network either, its copy is used.
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        ask_anew(s3fs)
        assert len(opened("wds:s3://pets/w/train.tar").splits["train"]) == 6
        assert "using the copy of" in capsys.readouterr().err
    ask_anew(s3fs)
    addresses.allow("wds:s3://pets/w/own.tar")
    with pytest.raises(InputError, match=r"own\.tar is refused \(Forbidden\); the credentials .* missing"):
        open_dataset("wds:s3://pets/w/own.tar")

    async def refuse(*_, **__):
        raise ClientError({"Error": {"Code": "ExpiredToken", "Message": "The provided token has expired."}}, "List")

    monkeypatch.setattr(s3fs.S3FileSystem, "_lsdir", refuse)
    ask_anew(s3fs)
    addresses.allow("wds:s3://pets/w/*.tar")
    with pytest.raises(InputError, match=r"token has expired.*missing, expired, or lack the right.*aws sso login"):
        open_dataset("wds:s3://pets/w/*.tar")

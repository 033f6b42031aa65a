"""Images on servers: downloaded once, resumed, compared, and never contacted because a file says so."""

import base64
import hashlib
import io
import logging
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from make_images import paint
from test_shards import write_tar
from web_server import WebServer, serve

from funmatch.cli import main
from funmatch.data.cache import open_cache
from funmatch.data.readers.open import open_dataset, resolve_spec
from funmatch.data.remote import buckets, download, fetch, web
from funmatch.data.remote.single import local_file
from funmatch.errors import InputError, hide_secrets
from funmatch.runtime import addresses, functions


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(addresses.ALLOWED, "")
    monkeypatch.setenv(functions.ALLOWED, "")
    for name in (addresses.OFFLINE, "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.001)
    fetch._checked.clear()
    web._told.clear()


@pytest.fixture(name="web_files")
def running_server():
    with serve() as server:
        yield server


@pytest.fixture(name="memory")
def memory_bucket():
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture(scope="session", name="jpegs")
def jpeg_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    return [paint(folder / f"{i}.jpg", i).read_bytes() for i in range(6)]


def tar_of(folder: Path, jpegs, labels=(0, 1, 0, 1, 0, 1)) -> bytes:
    members = {}
    for i, jpeg in enumerate(jpegs):
        members |= {f"{i}.jpg": jpeg, f"{i}.cls": str(labels[i]).encode()}
    write_tar(folder / "made.tar", members)
    return (folder / "made.tar").read_bytes()


def ask_again():
    """As another process would, a while later."""
    fetch._checked.clear()


def printed(capsys) -> str:
    return capsys.readouterr().err.replace("\n", " ")


def opened(spec, **options):
    addresses.allow(spec)
    return open_cache.open_cache(spec, **options)


def test_a_shard_is_the_same_data_as_on_this_machine_and_a_second_time_only_looked_up(
    web_files: WebServer, tmp_path, jpegs
):
    web_files.files["/a/train.tar"] = content = tar_of(tmp_path, jpegs)
    spec = f"wds:{web_files.address}/a/train.tar"
    cache = opened(spec)
    # The key is that of the content: wherever the copy lies, the decoded images are shared.
    assert cache.key == open_cache.open_cache(f"wds:{tmp_path}/made.tar").key
    assert cache.splits["train"].labels(slice(None)).tolist() == [0, 1, 0, 1, 0, 1]
    assert (tmp_path / "cache/remote").rglob("train.tar").__next__().read_bytes() == content
    assert web_files.bytes_asked() == [""]
    ask_again()
    assert opened(spec).key == cache.key
    assert web_files.bytes_asked() == [""]
    assert len(web_files.requests) == 3


def test_several_shards_by_braces(web_files: WebServer, tmp_path, jpegs, monkeypatch):
    for i in range(3):
        web_files.files[f"/s/train-{i:03}.tar"] = tar_of(tmp_path, jpegs[2 * i : 2 * i + 2])
    cache = opened(f"wds:{web_files.address}/s/train-{{000..002}}.tar")
    assert len(cache.splits["train"]) == 6
    # One more of them: only that one is read.
    web_files.files["/s/train-003.tar"] = tar_of(tmp_path, jpegs[:1])
    web_files.requests.clear()
    assert len(opened(f"wds:{web_files.address}/s/train-{{000..003}}.tar").splits["train"]) == 7
    assert [path for path, asked, _ in web_files.requests if asked != "bytes=0-0"] == ["/s/train-003.tar"]
    del web_files.files["/s/train-001.tar"]
    ask_again()
    with pytest.raises(InputError, match=r"train-001\.tar: there is no such file \(404 .*FUNMATCH_OFFLINE=1"):
        opened(f"wds:{web_files.address}/s/train-{{000..002}}.tar")
    # Two changed, and the second of them cannot be read: half of an update is no data set.
    web_files.files["/s/train-000.tar"] = web_files.files["/s/train-001.tar"] = tar_of(tmp_path, jpegs[:3])

    def refuse_the_second(_path):
        if web_files.bytes_asked():
            web_files.statuses["/s/train-001.tar"] = 403

    web_files.on_request = refuse_the_second
    monkeypatch.setattr(fetch, "AT_ONCE", 1)
    web_files.requests.clear()
    with pytest.raises(InputError, match="refuses it") as refused:
        opened(f"wds:{web_files.address}/s/train-{{000..002}}.tar")
    assert "FUNMATCH_OFFLINE" not in str(refused.value)
    monkeypatch.setenv(addresses.OFFLINE, "1")
    with pytest.raises(InputError, match="there is no whole copy"):
        opened(f"wds:{web_files.address}/s/train-{{000..002}}.tar")
    monkeypatch.delenv(addresses.OFFLINE)
    with pytest.raises(InputError, match="web servers have no listing of their files; name each"):
        opened(f"wds:{web_files.address}/s/*.tar")


def test_a_cut_connection_continues_where_it_broke(web_files: WebServer, tmp_path, jpegs):
    content = tar_of(tmp_path, jpegs)
    web_files.files["/train.tar"], web_files.cuts["/train.tar"] = content, 2
    opened(f"wds:{web_files.address}/train.tar")
    assert web_files.bytes_asked() == ["", "bytes=1000-", "bytes=2000-"]


def test_what_came_is_kept_for_the_next_command(web_files: WebServer, tmp_path, jpegs, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    content = tar_of(tmp_path, jpegs)
    web_files.files["/train.tar"], web_files.cuts["/train.tar"] = content, 1
    spec = f"wds:{web_files.address}/train.tar"
    with pytest.raises(InputError, match=rf"the connection was cut; 1,000 of {len(content):,} bytes are kept.*rerun"):
        opened(spec)
    assert not [*(tmp_path / "cache").rglob("train.tar")]
    monkeypatch.setenv(addresses.OFFLINE, "1")
    with pytest.raises(InputError, match="there is no whole copy"):
        opened(spec)
    monkeypatch.delenv(addresses.OFFLINE)
    web_files.requests.clear()
    opened(spec)
    assert web_files.bytes_asked() == ["bytes=1000-"]
    # The tag guards the rest: with another one, the server would send the whole.
    assert web_files.requests[-1][2]["If-Range"].startswith('"')


@pytest.mark.parametrize("fault", ["ranges", "tags"])
def test_servers_without_ranges_or_tags(web_files: WebServer, tmp_path, jpegs, fault):
    setattr(web_files, fault, False)
    content = tar_of(tmp_path, jpegs)
    web_files.files["/train.tar"], web_files.cuts["/train.tar"] = content, 1
    opened(f"wds:{web_files.address}/train.tar")
    assert next((tmp_path / "cache/remote").rglob("train.tar")).read_bytes() == content


def test_an_object_that_changes_between_two_commands_is_read_anew(web_files: WebServer, tmp_path, jpegs, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    spec = f"wds:{web_files.address}/train.tar"
    web_files.files["/train.tar"], web_files.cuts["/train.tar"] = tar_of(tmp_path, jpegs), 1
    with pytest.raises(InputError, match="kept"):
        opened(spec)
    # Half of the old and half of the new would have the right length.
    web_files.files["/train.tar"] = content = tar_of(tmp_path, jpegs, (1, 0, 1, 0, 1, 0))
    cache = opened(spec)
    assert next((tmp_path / "cache/remote").rglob("train.tar")).read_bytes() == content
    assert web_files.bytes_asked()[-1] == ""
    web_files.files["/train.tar"] = tar_of(tmp_path, jpegs[:4])
    ask_again()
    assert len(opened(spec).splits["train"]) == 4 < len(cache.splits["train"])


def test_an_object_that_changes_while_it_is_read_is_an_error(web_files: WebServer, tmp_path, jpegs):
    web_files.files["/train.tar"], web_files.cuts["/train.tar"] = tar_of(tmp_path, jpegs), 1
    other = tar_of(tmp_path, jpegs, (1, 0, 1, 0, 1, 0))
    asked = []

    def change(path):
        asked.append(path)
        if len(asked) == 3:
            web_files.files[path] = other

    web_files.on_request = change
    with pytest.raises(InputError, match=r"/train\.tar has changed while it was read; rerun the command"):
        opened(f"wds:{web_files.address}/train.tar")
    assert not [*(tmp_path / "cache").rglob("train.tar")]
    assert not [*(tmp_path / "cache").rglob("partial/*")]
    opened(f"wds:{web_files.address}/train.tar")


@pytest.mark.parametrize("way", ["x-goog-hash", "Repr-Digest"])
def test_checksums_of_the_server_are_compared(web_files: WebServer, tmp_path, jpegs, way):
    web_files.files["/train.tar"] = content = tar_of(tmp_path, jpegs)
    wrong, right = (base64.b64encode(hashlib.md5(each).digest()).decode() for each in (b"other", content))
    if way == "Repr-Digest":
        wrong, right = (base64.b64encode(hashlib.sha256(each).digest()).decode() for each in (b"other", content))
    shape = "crc32c=AAAAAA==,md5={}" if way == "x-goog-hash" else "sha-256=:{}:"
    web_files.more[way] = shape.format(wrong)
    with pytest.raises(InputError, match=r"arrived damaged twice \(its (MD5|SHA256) is"):
        opened(f"wds:{web_files.address}/train.tar")
    assert not [*(tmp_path / "cache").rglob("train.tar")]
    # Of a file that was unpacked on the way, the checksum is that of another one.
    web_files.more["x-goog-stored-content-encoding"] = "gzip"
    web_files.more[way] = shape.format(wrong if way == "x-goog-hash" else right)
    opened(f"wds:{web_files.address}/train.tar")
    ask_again()
    web_files.more["x-goog-stored-content-encoding"] = "identity"
    web_files.more[way] = shape.format(right)
    opened(f"wds:{web_files.address}/train.tar")


def test_without_a_network_the_whole_copy_is_used(web_files: WebServer, tmp_path, jpegs, monkeypatch, capsys):
    web_files.files["/train.tar"] = tar_of(tmp_path, jpegs)
    spec = f"wds:{web_files.address}/train.tar"
    key = opened(spec).key
    web_files.statuses["/train.tar"] = 503
    ask_again()
    assert opened(spec).key == key
    assert "cannot be reached (503 Service Unavailable); using the copy of 20" in capsys.readouterr().err.replace(
        "\n", " "
    )
    monkeypatch.setenv(addresses.OFFLINE, "1")
    web_files.requests.clear()
    ask_again()
    assert opened(spec).key == key
    assert web_files.requests == []
    # A copy of which a file is gone is not whole.
    next((tmp_path / "cache/remote").rglob("train.tar")).unlink()
    ask_again()
    with pytest.raises(InputError, match="there is no whole copy of it, and FUNMATCH_OFFLINE or HF_HUB_OFFLINE is set"):
        opened(spec)
    monkeypatch.delenv(addresses.OFFLINE)
    with pytest.raises(InputError, match="cannot be reached: 503 Service Unavailable; check the network"):
        opened(spec)


def test_prepare_finds_a_copy_that_was_damaged_on_the_disk(web_files: WebServer, tmp_path, jpegs):
    web_files.files["/train.tar"] = content = tar_of(tmp_path, jpegs)
    spec = f"wds:{web_files.address}/train.tar"
    opened(spec)
    copy = next((tmp_path / "cache/remote").rglob("train.tar"))
    state = copy.stat()
    copy.write_bytes(content[:600] + b"?" + content[601:])
    os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))
    opened(spec, refresh=True)
    assert copy.read_bytes() == content


def test_errors_of_servers_name_the_address_and_what_to_do(web_files: WebServer, monkeypatch):
    web_files.files["/page"], web_files.kinds["/page"] = b"<html>", "text/html; charset=utf-8"
    web_files.files["/endless.tar"] = b"x" * 100
    web_files.statuses |= {"/secret.tar": 403, "/gone.tar": 410, "/odd.tar": 418}
    for path, message in {
        "/secret.tar": r"the server refuses it \(403 Forbidden\); a signed address may have expired.*netrc",
        "/gone.tar": "there is no such file",
        "/odd.tar": "cannot be read: 418",
        "/page": "is a web page, maybe a login; pass the address of the file itself",
    }.items():
        with pytest.raises(InputError, match=rf"127\.0\.0\.1.*{path}.*{message}"):
            opened(f"wds:{web_files.address}{path}")
    web_files.lengths = web_files.ranges = False
    with pytest.raises(InputError, match="does not say how long"):
        opened(f"wds:{web_files.address}/endless.tar")
    monkeypatch.setattr(web, "TIMEOUT_SECONDS", 0.1)
    with pytest.raises(InputError, match="cannot be reached: Connection refused; check the network"):
        opened("wds:http://127.0.0.1:9/train.tar")
    web_files.lengths = web_files.ranges = True
    web_files.files["/%2e%2e/%2e%2e/train.tar"] = b"x"
    for wrong in ("http://host:99999/a.tar", "http:///a.tar", "http://[::1/a.tar", "http://host:x/a.tar"):
        with pytest.raises(InputError, match="is not a valid address"):
            opened(f"wds:{wrong}")
    with pytest.raises(InputError, match="names no file"):
        opened(f"wds:{web_files.address}/%2e%2e/%2e%2e/train.tar")


def test_redirects_are_followed_by_name_and_without_credentials(web_files: WebServer, tmp_path, jpegs, capsys):
    with serve() as other:
        other.files["/cdn/train.tar"] = tar_of(tmp_path, jpegs)
        there = other.address.replace("127.0.0.1", "localhost")
        web_files.redirects["/train.tar"] = f"{there}/cdn/train.tar?X-Amz-Signature=abcdef"
        web_files.logins["/train.tar"] = "Basic " + base64.b64encode(b"me:secret").decode()
        address = web_files.address.replace("://", "://me:secret@")
        assert len(opened(f"wds:{address}/train.tar").splits["train"]) == 6
        assert all("Authorization" not in headers for *_, headers in other.requests)
    said = printed(capsys)
    assert "127.0.0.1 leads to localhost, which is read instead" in said
    assert "secret" not in said
    assert "abcdef" not in said
    web_files.redirects["/train.tar"] = "ftp://elsewhere/train.tar"
    ask_again()
    with pytest.raises(
        InputError, match=r"leads to ftp://elsewhere/train\.tar, which is not on a web server; pass ano"
    ):
        opened(f"wds:{address}/train.tar")


def test_redirects_that_lead_to_no_file_are_one_sentence(web_files: WebServer):
    for path, (place, message) in {
        "/file.tar": (
            "file:///etc/passwd?token=abcdef",
            r"leads to file:///etc/passwd.*, which is not on a web server",
        ),
        "/circle.tar": ("/circle.tar", r"in a circle or more than 5 times; the last one leads to /circle\.tar; maybe"),
        "/nowhere.tar": ("", r"leads elsewhere without saying where; check it"),
    }.items():
        web_files.redirects[path] = place
        with pytest.raises(InputError, match=message) as raised:
            opened(f"wds:{web_files.address}{path}")
        assert "\n" not in str(raised.value)
        assert "abcdef" not in str(raised.value)


def test_a_public_server_may_not_lead_into_this_network(monkeypatch):
    private = {"host": False, "10.0.0.1": True, "cdn": False}
    monkeypatch.setattr(web, "_is_private", lambda host: private[host])
    follow = web._Redirects("https://host/a.tar").redirect_request
    request = web.urllib.request.Request("https://host/a.tar", headers={"Authorization": "Basic x"})
    with pytest.raises(InputError, match=r"leads to https://10\.0\.0\.1/x, which is in this machine's own network"):
        follow(request, None, 302, "Found", {}, "https://10.0.0.1/x")
    with pytest.raises(InputError, match="which is not encrypted"):
        follow(request, None, 302, "Found", {}, "http://host/a.tar")
    assert not follow(request, None, 302, "Found", {}, "https://cdn/a.tar").has_header("Authorization")
    assert follow(request, None, 302, "Found", {}, "https://host/b.tar").has_header("Authorization")
    monkeypatch.undo()
    assert web._is_private("127.0.0.1")
    assert web._is_private("169.254.169.254")
    assert not web._is_private("8.8.8.8")


def test_a_bucket_is_listed_and_followed(memory, tmp_path, jpegs):
    for i, jpeg in enumerate(jpegs):
        memory.pipe(f"/b/pets/train/{'cat' if i % 2 else 'dog'}/{i}.jpg", jpeg)
    spec = "memory://b/pets"
    cache = opened(spec)
    assert (cache.classes, cache.name, len(cache.splits["train"])) == (("cat", "dog"), "pets", 6)
    # One is gone, one is new: the copy follows, and the old one is no longer data.
    memory.rm("/b/pets/train/dog/0.jpg")
    memory.pipe("/b/pets/train/dog/9.jpg", paint(tmp_path / "9.jpg", 9).read_bytes())
    ask_again()
    assert open_dataset(spec).splits["train"].names[-1] == "train/dog/9.jpg"
    assert len(opened(spec).splits["train"]) == 6
    memory.rm("/b/pets/train/dog/9.jpg")
    ask_again()
    assert len(opened(spec).splits["train"]) == 5


def test_shards_of_a_bucket_by_patterns_with_their_class_names(memory, tmp_path, jpegs):
    memory.pipe("/b/w/train/0.tar", tar_of(tmp_path, jpegs[:4]))
    memory.pipe("/b/w/val/0.tar", tar_of(tmp_path, jpegs[4:]))
    memory.pipe("/b/w/classes.txt", b"cat\ndog\n")
    memory.pipe("/b/w/readme.md", b"about")
    for spec in ("wds:memory://b/w/*/*.tar", "wds:memory://b/w", "wds:memory://b/w/{train,val}/0.tar"):
        cache = opened(spec)
        assert (cache.classes, [*cache.splits]) == (("cat", "dog"), ["train", "val"])
    assert not [*(tmp_path / "cache").rglob("readme.md")]
    memory.rm("/b/w/val/0.tar")
    memory.rm("/b/w/classes.txt")
    ask_again()
    cache = opened("wds:memory://b/w/*/*.tar")
    # The copy of a class file that is gone names no classes either.
    assert ([*cache.splits], cache.classes) == (["train"], ("0", "1"))
    with pytest.raises(InputError, match=r"memory://b/none: there is no such file or bucket"):
        opened("wds:memory://b/none")
    with pytest.raises(InputError, match="is a pattern; name the kind of its files: tfrecord:memory://b/w/"):
        opened("memory://b/w/*")
    with pytest.raises(InputError, match=r"pass wds:memory://b/w/train/0\.\*\.tar"):
        opened("memory://b/w/train/0.*.tar")


def test_pieces_of_a_bucket_resume_and_a_change_is_noticed(memory, tmp_path, jpegs, monkeypatch):
    monkeypatch.setattr(buckets, "BLOCK", 1000)
    monkeypatch.setattr(download, "BLOCK_IN_ONE", 1000)
    monkeypatch.setattr(download, "TRIES", 1)
    content = tar_of(tmp_path, jpegs)
    memory.pipe("/b/train.tar", content)
    read, asked = memory.cat_file, []

    def fail_once(path, start=None, end=None):
        asked.append(start)
        if asked == [0, 1000, 2000]:
            raise TimeoutError("read timed out")
        return read(path, start, end)

    monkeypatch.setattr(memory, "cat_file", fail_once)
    with pytest.raises(InputError, match=r"read timed out; 2,000 of [\d,]+ bytes are kept, so rerun"):
        opened("wds:memory://b/train.tar")
    opened("wds:memory://b/train.tar")
    assert asked[3:6] == [2000, 3000, 4000]

    def change(path, start=None, end=None):
        block = read(path, start, end)
        if start == 2000:
            memory.pipe("/b/other.tar", content)
        return block

    memory.pipe("/b/other.tar", content)
    monkeypatch.setattr(memory, "cat_file", change)
    with pytest.raises(InputError, match=r"memory://b/other\.tar has changed while it was read; rerun"):
        opened("wds:memory://b/other.tar")


def archive(kind: str, members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            for name, content in members.items():
                packed.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode=kind) as packed:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize(("name", "kind"), [("pets.zip", "zip"), ("pets.tar.gz", "w:gz"), ("pets.tar", "w")])
def test_an_archive_is_unpacked_to_a_folder_of_images(web_files: WebServer, tmp_path, jpegs, name, kind):
    members = {f"{'cat' if i % 2 else 'dog'}/{i}.jpg": jpeg for i, jpeg in enumerate(jpegs)}
    web_files.files[f"/{name}"] = archive(kind, members)
    cache = opened(f"{web_files.address}/{name}")
    assert (cache.name, cache.classes, len(cache.splits["train"])) == ("pets", ("cat", "dog"), 6)
    for path, content in members.items():
        (tmp_path / "local" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / path).write_bytes(content)
    assert cache.key == open_cache.open_cache(str(tmp_path / "local")).key
    web_files.files[f"/{name}"] = archive(kind, dict([*members.items()][:4]))
    ask_again()
    assert len(opened(f"{web_files.address}/{name}").splits["train"]) == 4
    assert len([*(tmp_path / "cache").rglob("unpacked/*.*/pets")]) == 1


def test_messages_about_an_archive_name_its_address(web_files: WebServer, tmp_path, jpegs):
    web_files.files["/train.tar"] = tar_of(tmp_path, jpegs)
    address = f"{web_files.address}/train.tar"
    notes = opened(address).summary["notes"]
    assert f"{address}: read as an archive of a folder; if it is a WebDataset shard, pass wds:{address}" in notes
    assert any(note.startswith(f"skipped 6 files in {address}, e.g. 0.cls") for note in notes)
    web_files.files["/two.zip"] = archive(
        "zip", {"x/y.jpg": jpegs[0], "x/c/1.jpg": jpegs[1], "train/a/z.jpg": jpegs[2]}
    )
    with pytest.raises(InputError) as raised:
        opened(f"{web_files.address}/two.zip")
    assert str(raised.value).startswith(f"{web_files.address}/two.zip has images in x beside the splits train")


def test_archives_cannot_write_elsewhere_and_have_limits(web_files: WebServer, tmp_path, jpegs, monkeypatch):
    outside = archive("zip", {"../../x.jpg": jpegs[0]})
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w") as packed:
        info = tarfile.TarInfo("cat/0.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        packed.addfile(info)
    monkeypatch.setattr("funmatch.data.formats.compressed.EXPANDS_FREELY", 10**5)
    good = archive("w:gz", {"a/0.jpg": jpegs[0], "b/1.jpg": jpegs[1]})
    for name, content, message in (
        ("outside.zip", outside, "is a link or leads outside"),
        ("link.tar", link.getvalue(), "is a link or leads outside"),
        ("bomb.tgz", archive("w:gz", {"0.jpg": bytes(10**6)}), "holds more than 100 times its own size"),
        ("cut.tgz", good[: len(good) // 2], "is not a complete archive"),
        ("not.zip", b"GIF89a", "is not a complete archive"),
    ):
        web_files.files[f"/{name}"] = content
        with pytest.raises(InputError, match=message):
            opened(f"{web_files.address}/{name}")
    assert not [*(tmp_path / "cache").rglob("*.jpg")]


def test_what_is_shown_and_recorded_of_an_address_has_no_secrets():
    given = "wds:https://me:p%40ss@host:8443/a/train-{000..002}.tar?id=7&X-Amz-Signature=abc&sig=x&token=y#z"
    assert hide_secrets(given) == "wds:https://host:8443/a/train-{000..002}.tar?id=7#z"
    assert hide_secrets(hide_secrets(given)) == hide_secrets(given) == resolve_spec(given)
    assert hide_secrets("https://ghp_token@host/x see https://u:p/w@host/y") == "https://host/x see https://…"
    long = hide_secrets(f"https://host/x?blob={'a1B2' * 12}")
    assert long != hide_secrets(f"https://host/x?blob={'a1B3' * 12}")
    assert "a1B2" not in long
    assert hide_secrets("s3://bucket/a?b*.tar") == "s3://bucket/a?b*.tar"
    assert hide_secrets("postgresql+psycopg://me:pw@host/db?x=1") == "postgresql+psycopg://me@host/db?x=1"
    addresses.allow(f"--data={given}")
    assert addresses.given_address(hide_secrets(given).partition("wds:")[2]) == given.partition("wds:")[2]
    addresses.allow(hide_secrets(given))
    assert "p%40ss" in str(addresses.given_address(hide_secrets(given).partition("wds:")[2]))
    # A user and a password are no function.
    assert functions._allowed() == []
    functions.allow([given, "mod:f"])
    assert functions._allowed() == ["mod:f"]


def test_a_command_with_a_login_records_none_of_it(web_files: WebServer, tmp_path, jpegs, capsys):
    web_files.files["/train.tar"] = tar_of(tmp_path, jpegs)
    web_files.logins["/train.tar"] = "Basic " + base64.b64encode(b"me:hunter2").decode()
    address = web_files.address.replace("://", "://me:hunter2@")
    with pytest.raises(SystemExit) as ended:
        main(["prepare", f"wds:{address}/train.tar?sig=topsecret", "--json"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for word in ("hunter2", "topsecret"):
        assert word not in said.out + said.err
        assert word.encode() not in kept
    with pytest.raises(SystemExit) as ended:
        main(["prepare", f"wds:{address.replace('hunter2', 'wrong')}/other.tar?sig=topsecret", "--json"])
    assert ended.value.code == 2
    assert "topsecret" not in capsys.readouterr().err


def test_no_address_is_contacted_because_a_file_names_it(web_files: WebServer, tmp_path, jpegs, capsys):
    web_files.files["/train.tar"] = tar_of(tmp_path, jpegs)
    spec = f"wds:{web_files.address}/train.tar"
    with pytest.raises(InputError, match=r"is an address that a file names.*FUNMATCH_ALLOW_ADDRESSES='http://127"):
        open_cache.open_cache(spec)
    stranger = tmp_path / "options.yaml"
    stranger.write_text(f"data: ['{spec}']\n")
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "--config", str(stranger)])
    assert ended.value.code == 2
    assert web_files.requests == []
    # What its owner has opened on this machine is used, without a question to the server.
    key = opened(spec).key
    web_files.requests.clear()
    ask_again()
    addresses.os.environ[addresses.ALLOWED] = ""
    assert open_cache.open_cache(spec).key == key
    assert "only a file names it, so its server is not asked; using the copy" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert web_files.requests == []


def test_damage_in_what_is_known_of_copies_costs_a_download_at_most(web_files: WebServer, tmp_path, jpegs):
    web_files.files["/train.tar"] = tar_of(tmp_path, jpegs)
    spec = f"wds:{web_files.address}/train.tar"
    key = opened(spec).key
    state = next((tmp_path / "cache/remote").glob("*/.state"))
    for path in (state / "files.jsonl", *(state / "listings").iterdir()):
        content = path.read_bytes()
        for damaged in (b"", b"\x00" * 9, content[: len(content) // 2], content.replace(b":", b";", 1), b"[" * 10**5):
            path.write_bytes(damaged)
            ask_again()
            assert opened(spec).key == key
    assert len(web_files.bytes_asked()) <= 11


@pytest.mark.slow
def test_a_process_that_is_killed_continues(web_files: WebServer):
    web_files.files["/big.bin"] = content = os.urandom(20 << 20)
    address = f"{web_files.address}/big.bin"
    code = f"""
import os
from funmatch.data.remote import download, fetch
from funmatch.runtime import addresses
addresses.allow({address!r})
keep = download._keep
def keep_and_die(*arguments):
    keep(*arguments)
    os.kill(os.getpid(), 9)
download._keep = keep_and_die
fetch.fetch({address!r}, fetch.EVERYTHING)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    addresses.allow(address)
    assert fetch.fetch(address, fetch.EVERYTHING).files[0].read_bytes() == content
    assert web_files.bytes_asked() == ["", f"bytes={8 << 20}-"]


def test_two_at_once_download_once(web_files: WebServer, tmp_path, jpegs):
    web_files.files["/train.tar"] = tar_of(tmp_path, jpegs)
    address = f"{web_files.address}/train.tar"
    addresses.allow(address)
    results = []

    def work():
        fetch._checked.clear()
        results.append(fetch.fetch(address, fetch.EVERYTHING))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert web_files.bytes_asked() == [""]


def test_predict_takes_images_of_servers(web_files: WebServer, memory, jpegs):
    from funmatch.data.dataset import ReadOptions
    from funmatch.shipping.sources.find import check_path, find_images, names_several

    web_files.files["/a/0.jpg"] = jpegs[0]
    web_files.files["/pets.zip"] = archive("zip", {"cat/1.jpg": jpegs[1]})
    memory.pipe("/b/x/2.jpg", jpegs[2])
    memory.pipe("/b/x/3.jpg", jpegs[3])
    wanted = {
        f"{web_files.address}/a/0.jpg": {f"{web_files.address}/a/0.jpg": 0},
        f"{web_files.address}/pets.zip": {f"{web_files.address}/pets.zip/cat/1.jpg": 1},
        "memory://b/x": {"memory://b/x/2.jpg": 2, "memory://b/x/3.jpg": 3},
        "memory://b/x/*.jpg": {"memory://b/x/2.jpg": 2, "memory://b/x/3.jpg": 3},
    }
    for address, images in wanted.items():
        addresses.allow(address)
        check_path(address)
        found = list(find_images([address], ReadOptions(unlabelled=True)).images)
        assert {image.path: image.read() for image in found} == {name: jpegs[i] for name, i in images.items()}
    assert not names_several(f"{web_files.address}/a/0.jpg")
    assert names_several("memory://b/x/*.jpg")
    from funmatch.config import PredictionOptions
    from funmatch.shipping.sources.given import is_single, read_given

    os.environ[addresses.ALLOWED] = ""
    (image,) = read_given([f"{web_files.address}/a/0.jpg"], PredictionOptions(model="x"))
    assert image.path == f"{web_files.address}/a/0.jpg"
    assert is_single(image.path)
    assert not is_single("memory://b/x")
    with pytest.raises(InputError, match="web servers have no listing"):
        check_path(f"{web_files.address}/photos/")


@pytest.mark.slow  # the library takes five seconds to import
def test_tables_of_a_bucket(memory, tmp_path, jpegs):
    datasets = pytest.importorskip("datasets")
    for name, some in (("train-0", jpegs[:2]), ("train-1", jpegs[2:4]), ("test-0", jpegs[4:])):
        table = datasets.Dataset.from_dict({"image": [{"bytes": jpeg, "path": None} for jpeg in some], "label": [0, 1]})
        table.to_parquet(tmp_path / f"{name}.parquet")
        memory.pipe(f"/b/t/{name}.parquet", (tmp_path / f"{name}.parquet").read_bytes())
    addresses.allow("memory://b/t/*.parquet")
    found = open_dataset("hf:memory://b/t/*.parquet")
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 4, "test": 2}
    assert [found.read("train", i) for i in range(4)] == jpegs[:4]
    addresses.allow("memory://b/t/test-0.parquet")
    assert len(open_dataset("hf:memory://b/t/test-0.parquet").splits["train"]) == 2


class FakeError(Exception):
    def __init__(self, text, code=None):
        super().__init__(text)
        self.code = code


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError("Access Denied"), "is refused .*aws configure.*Without the right to list, name each file"),
        (FakeError("The provided token has expired"), "missing, expired, or lack the right"),
        (FakeError("Anonymous caller does not have storage.objects.list access", 401), "is refused"),
        (FileNotFoundError("b/timeout.tar"), "there is no such file or bucket"),
        (FakeError("odd"), "cannot be read: odd; check the address and the credentials"),
    ],
)
def test_errors_of_buckets_are_one_message(error, message):
    found = buckets.explain(error, "s3://b/a.tar")
    assert isinstance(found, InputError)
    assert re.search(f"s3://b/a.tar.*{message}", str(found))


@pytest.mark.parametrize("error", [TimeoutError("x"), ConnectionError("y"), FakeError("try later", 503)])
def test_broken_connections_of_buckets_are_tried_again(error):
    assert isinstance(buckets.explain(error, "s3://b/a.tar"), buckets.Unreachable)


class NoCredentialsError(Exception):
    """As botocore's is called."""


def test_without_a_login_and_a_network_nothing_is_refused(monkeypatch, capsys):
    class Files:
        def __init__(self, anon: bool) -> None:
            self.anon = anon

        def invalidate_cache(self) -> None:
            pass

        def info(self, _: str) -> dict:
            # Raised while another is handled, as by the libraries.
            raise ConnectionError("Could not connect") if self.anon else NoCredentialsError("Unable to locate")

    monkeypatch.setattr(buckets, "_open", lambda _, *, anonymous: Files(anonymous))
    # Only what is unreachable lets a whole copy be used.
    with pytest.raises(buckets.Unreachable, match="Could not connect"):
        buckets.BucketFiles("s3").find("s3://public/a.tar", fetch.EVERYTHING)
    assert "there are no credentials for S3 here; reading without any" in printed(capsys)


@pytest.mark.skipif(not find_spec("gcsfs"), reason="needs gcsfs")
def test_the_log_of_a_library_shows_no_traceback(capfd):
    buckets._open.cache_clear()
    with suppress(Exception):  # it may look for credentials at once
        buckets._open("gs", anonymous=True)
    try:
        raise ConnectionError("no route")
    except ConnectionError:
        logging.getLogger("gcsfs").exception("_request out of retries")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("spec", ["{}", "tfrecord:{}", "wds:{}", "csv:{}", "hf:{}"])
def test_addresses_of_other_kinds_are_told_behind_any_prefix(spec):
    with pytest.raises(
        InputError, match=r"^ftp://host/a\.tar is an address of another kind; expected one of gs://, s3"
    ):
        open_dataset(spec.format("ftp://host/a.tar"))
    with pytest.raises(InputError, match=r"^file:///a\.tar is an address; pass /a\.tar"):
        open_dataset(spec.format("file:///a.tar"))
    with pytest.raises(InputError, match=r"ftp://host/names\.txt is an address of another kind"):
        local_file("ftp://host/names.txt")


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: (_ for _ in ()).throw(ImportError("Install s3fs")))
    buckets._open.cache_clear()
    addresses.allow("s3://b/x.tar")
    with pytest.raises(InputError, match=r"s3:// needs the library s3fs; pip install 'funmatch\[s3\]'"):
        open_dataset("wds:s3://b/x.tar")


def test_names_that_no_disk_can_hold():
    source = buckets.BucketFiles("memory")
    with pytest.raises(InputError, match="cannot be a file's on this machine"):
        source._describe("memory://b/w", {"name": "/b/w/../../0.tar", "size": 1})


@pytest.mark.slow
def test_a_run_on_a_server_with_a_login_and_a_strangers_copy_of_it(web_files: WebServer, tmp_path, jpegs, capsys):
    """What is recorded has no secrets; the run resumes and is evaluated without them, elsewhere it stops."""
    for name, labels in (("train", (0, 1, 0, 1, 0, 1)), ("val", (1, 0, 1, 0, 1, 0))):
        web_files.files[f"/{name}.tar"] = tar_of(tmp_path, jpegs if name == "train" else jpegs[::-1], labels)
    web_files.logins["/train.tar"] = "Basic " + base64.b64encode(b"me:hunter2").decode()
    address = web_files.address.replace("://", "://me:hunter2@")
    out = tmp_path / "run"
    words = ["train", "--data", f"wds:{address}/{{train,val}}.tar?token=topsecret", "--student", "resnet10t"]
    words += ["--side", "32", "--steps", "2", "--batch", "2", "--out", str(out), "--device", "cpu"]

    def run(*words):
        ask_again()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words)])
        return ended.value.code, capsys.readouterr()

    said = []
    for each in (words, words, ("evaluate", out, "--json"), ("report", out)):
        code, printed_text = run(*each)
        assert code == 0, printed_text.err
        said += [printed_text.out, printed_text.err]
        addresses.os.environ[addresses.ALLOWED] = ""
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in ("hunter2", "topsecret"):
        assert secret not in "".join(said)
        assert secret.encode() not in kept
    assert f"wds:{web_files.address}/{{train,val}}.tar" in (out / "config.json").read_text()
    assert "nothing to do" in "".join(said)
    # On another machine there is no copy.
    web_files.requests.clear()
    addresses.os.environ["FUNMATCH_CACHE"] = str(tmp_path / "other")
    code, printed_text = run("evaluate", out)
    assert (code, web_files.requests) == (2, [])
    assert "is an address that a file names" in printed_text.err


def test_a_study_names_the_address_before_it_begins(web_files: WebServer, monkeypatch):
    from funmatch.commands.study.spec import parse

    text = f"""title = "t"
[common]
data = "wds:{web_files.address}/train.tar"
student = "resnet10t"
steps = 1
[[run]]
name = "one"
verb = "train"
"""
    with pytest.raises(InputError, match=r"one: http://127.*is an address that a file names"):
        parse(text, "study.toml")
    monkeypatch.setenv(addresses.ALLOWED, f"https://host/other.tar\n{web_files.address}/train.tar")
    assert len(parse(text, "study.toml").entries) == 1
    assert web_files.requests == []

"""Undamaged files that the fuzzers begin with, and odd ones whose checksums are right."""

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from funmatch.commands.study.files import BUILT_IN
from funmatch.data.formats.tfrecord import example, frame
from funmatch.models.bit import STEM, layout

Change = Callable[[bytes], bytes]
FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
"""Offset and size of the fields of a tar's header that are changed."""
LABELS = (b"1", b"-1", b"9" * 40, b"-" + b"9" * 40, b"", b"\xff", b"1.5", b"nan", b" 7\n", b"0x10", "٣".encode())
PAX = (
    {"size": "x"}, {"size": "-1"}, {"size": "9" * 30},
    {"GNU.sparse.size": "x", "GNU.sparse.map": "1,2,3"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "y"}, {"path": "../x.png"},
    {"path": "a\x1b.png"}, {"mtime": "nan"}, {"GNU.sparse.numblocks": "9" * 20},
    {"hdrcharset": "BINARY", "path": "\udcff"},
)  # fmt: skip


def unchanged(content: bytes) -> bytes:
    """Returns what it is given."""
    return content


@lru_cache
def png() -> bytes:
    """A small image."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 200, 30)).save(file, "PNG")
    return file.getvalue()


def records(change: Change) -> bytes:
    """Three TFRecords, the second one changed; all checksums are right."""
    plain = [example(png(), [label]) for label in (0, 1, 2)]
    return b"".join(frame(change(each) if i == 1 else each) for i, each in enumerate(plain))


def tar(members: tuple[tuple[str, bytes], ...] = (), headers: dict[str, str] | None = None) -> bytes:
    """A WebDataset's shard of two samples, and of the members that are given."""
    file, whole = io.BytesIO(), (("0.png", png()), ("0.cls", b"0"), ("1.png", png()), ("1.json", b'{"label": 1}'))
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        for name, content in (*whole, *members):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if headers and name == members[0][0]:
                member.pax_headers = headers
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zip_of_images() -> bytes:
    """A zip archive of a folder of images."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in ("cat/1.png", "dog/ü.png", "dog/more/3.png"):
            packed.writestr(name, png())
    return file.getvalue()


def odd_tar(rng: random.Random) -> bytes:
    """A tar with an odd label, odd PAX headers, or a changed field in a header whose checksum is right."""
    kind = rng.randrange(4)
    if kind == 0:
        return tar((("2.png", png()), ("2.cls", rng.choice(LABELS))))
    if kind == 1:
        depth = rng.choice((1, 70, 10_000))
        deep = b'{"label": ' + b"[" * depth + b"1" + b"]" * depth + b"}"
        return tar(
            (("2.png", png()), ("2.json", rng.choice((deep, b'{"label": 1e400}', b"[1]", b'{"label": {"a": 1}}'))))
        )
    if kind == 2:
        return tar((("2.png", png()),), rng.choice(PAX))
    content = bytearray(tar())
    start = rng.randrange(4) * 1024
    header = content[start : start + 512]
    at, size = rng.choice(FIELDS)
    value = rng.choice(
        (b"\xff" * size, b"\x80" + b"\xff" * (size - 1), b"7" * size, b"9" * size, b"-1", b"S", b"x", b"")
    )
    header[at : at + size] = value[:size].ljust(size, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[start : start + 512] = header
    return bytes(content)


def npz(change: Change = unchanged) -> bytes:
    """Small arrays under the names of a BiT-R50x1; the bytes of three of them, those that are read, are changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in layout((3, 4, 6, 3), 64, 2):
            shape = (7, 7, 3, 64) if name == STEM else (1, 1, 2, 2) if name.endswith("kernel") else (2,)
            array = io.BytesIO()
            np.save(array, np.ones(shape, np.float32))
            read = name == STEM or name.startswith("group_norm")
            archive.writestr(f"resnet/{name}.npy", change(array.getvalue()) if read else array.getvalue())
    return file.getvalue()


def safetensors_file() -> bytes:
    """Two small tensors."""
    return safetensors.torch.save({"a.weight": torch.ones(3, 2), "b": torch.arange(4)}, {"format": "pt"})


def torch_file() -> bytes:
    """A state dict as `torch.save` writes it."""
    file = io.BytesIO()
    torch.save({"state_dict": {"a.weight": torch.ones(3, 2), "b": torch.arange(4)}, "epoch": 3}, file)
    return file.getvalue()


def study() -> str:
    """The text of a study of ours."""
    return (BUILT_IN / "temperature.toml").read_text()


def study_results() -> bytes:
    """Results of two runs of a study."""
    one = {
        "format": 1, "place": "a-0", "name": "a", "group": "a", "seed": 0, "verb": "distill", "shown": True,
        "asked": {"lr": 0.1}, "knobs": {"data": ["fashion-mini"], "student": "s", "teacher": ["t"]},
        "facts": {"machine": "m", "versions": {"torch": "2"}, "pictures": {"train": 10}, "parameters": 5},
        "figures": {"seconds": 1.5, "top1": 0.5, "kl": None}, "curves": {"eval": {"step": [1, 2], "top1": [0.1, None]}},
    }  # fmt: skip
    return b"".join(json.dumps(one | {"seed": seed, "place": f"a-{seed}"}).encode() + b"\n" for seed in (0, 1))

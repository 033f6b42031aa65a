"""Tells from the first bytes of a file what it is, for files that are taken for weights and are not."""

import re
import zipfile
from pathlib import Path

LFS = "a pointer of Git LFS, not the weights themselves; fetch them with `git lfs pull`"
PAGE = "a web page, not the weights; download the file itself (on the Hugging Face Hub: /resolve/ instead of /blob/)"
KERAS = "a file of Keras, from which BiT networks are read; name it .keras or .h5, and pass it as the model itself"
PACKED = "packed with {}; unpack it first"

BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", LFS),
    (b"<!doctype html", PAGE),
    (b"<html", PAGE),
    (b"<?xml", "an XML file, probably the error message of a download; download it again"),
    (b"\x89hdf\r\n", f"an HDF5 file, probably {KERAS}"),
    (b"\x1f\x8b", PACKED.format("gzip (gunzip)")),
    (b"bzh", PACKED.format("bzip2 (bunzip2)")),
    (b"\xfd7zxz", PACKED.format("xz (unxz)")),
    (b"\x28\xb5\x2f\xfd", PACKED.format("Zstandard (unzstd)")),
    (b"7z\xbc\xaf", PACKED.format("7-Zip")),
    (b"rar!", PACKED.format("RAR")),
    (b"gguf", "a model of llama.cpp (GGUF), not of PyTorch"),
    (b"\x93numpy", "a single array of NumPy; only the .npz files of BiT networks can be read"),
)
"""First bytes in small letters, and what such a file is."""
START = 512


def describe(path: Path) -> str:
    """Returns what a file is that does not hold weights, and what to do; empty if its bytes do not tell."""
    with open(path, "rb") as file:
        start = file.read(START)
    if not start:
        return "an empty file; download or copy it again"
    lowered = start.lstrip().lower()
    if found := next((what for beginning, what in BEGINNINGS if lowered.startswith(beginning)), ""):
        return found
    if start[4:8] == b"TFL3":
        return "a model of TensorFlow Lite, which cannot be loaded"
    # A message of protocol buffers: its version, then the name of the program that wrote it.
    if re.match(rb"\x08[\x01-\x20]\x12[\x01-\x40][\w.-]+", start) or path.suffix.lower() == ".onnx":
        return "a model of ONNX, which cannot be loaded; pass the weights that it was exported from"
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it and pass the file of weights inside"
    if start.startswith(b"PK"):
        return _describe_zip(path)
    # A page or a message in place of a file; the beginning is the best hint at what went wrong.
    if all(byte >= 32 or byte in b"\t\n\r" for byte in start):
        text = " ".join(start[:60].decode(errors="replace").split())
        return f"a text file, not weights; it begins with {text!r}"
    return ""


def _describe_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # Damage in a zip's directory also shows as names that are no text, or as a version that nobody wrote.
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "damaged or incomplete; download or copy it again"
    if any(name.endswith("/data.pkl") for name in names):
        return ""  # of torch.save: what is wrong with it lies deeper
    if any(name.endswith(".weights.h5") for name in names):
        return KERAS
    if any(name.endswith(".npy") for name in names):
        return "a file of NumPy arrays; rename it to .npz, as which BiT networks are read"
    if any(name.endswith(("model.json", "archive_format", "serialized_exported_program.json")) for name in names):
        return (
            "a program of torch.export, which is not run; save the tensors in it: "
            "torch.save(torch.export.load(path).state_dict, 'weights.pth')"
        )
    return f"a zip archive of {', '.join(names[:3]) or 'nothing'}; unpack it and pass the file of weights inside"

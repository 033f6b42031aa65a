"""Says what files are that lie where images were expected, and what to do with them."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from funmatch.data.decode import EXTENSIONS
from funmatch.data.readers.folder_listing import BESIDE_IMAGES, TABLES, FolderListing, ending
from funmatch.data.readers.split_names import says_split

ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".gz", ".bz2", ".xz")
SHEETS = TABLES | {".xls", ".xlsx"}
ARRAYS = {".npz", ".npy", ".h5", ".hdf5", ".pkl", ".pickle", ".mat", ".lmdb", ".mdb", ".pt", ".pth", ".beton", ".rec"}
PHOTOS = {
    ".heic", ".heif", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".dcm", ".nii", ".psd", ".svg", ".pdf",
    ".mp4", ".avi", ".mov", ".mkv", ".npy", ".mat", ".jxl", ".tga", ".exr", ".hdr", ".eps", ".jxr", ".heics",
}  # fmt: skip
"""Endings of pictures and videos that must be converted first."""


def describe_file(path: Path, recommend_reader: Callable[[Path], str]) -> str:
    """Returns what a path is that is not a folder, and what to do."""
    if not path.exists():
        return f"{path} is missing; expected a folder of images"
    # An archive's inner name counts for nothing: x.tar.gz is not a WebDataset shard.
    name = path.name.lower()
    if name.endswith(ARCHIVES):
        return f"{path} is an archive; unpack it, and pass the folder"
    if advice := recommend_reader(path):
        return f"{path} is a file, not a folder of images; {advice}"
    kind = ending(name)
    if kind in EXTENSIONS:
        return f"{path} is a single image; expected a folder of images, such as {path.absolute().parent}"
    if kind in SHEETS:
        return (
            f"{path} is a file; expected a folder of images; a table of labels is not read: save it as CSV with a "
            "column of paths and pass csv:FILE, or put the images into one folder per class"
        )
    if kind in ARRAYS:
        return f"{path} is a file of arrays or records; write its images as files (.png, .jpg), one folder per class"
    return f"{path} is a file; expected a folder of images"


def describe_skipped(listing: FolderListing, folder: str = "") -> str:
    """Returns what lies in a folder without images: `, but 6 files such as a/0.HEIC; …`; empty where nothing does."""
    prefix = f"{folder}/" if folder else ""
    skipped = sorted(name for name in listing.skipped if name.startswith(prefix))
    kinds = Counter(ending(name) for name in skipped)
    # Files that lie beside images are not what was meant, unless there is nothing else.
    meant = {kind: count for kind, count in kinds.items() if kind not in BESIDE_IMAGES - PHOTOS} or kinds
    if not meant:
        return ""
    kind = max(meant, key=lambda each: meant[each])
    example = next(name for name in skipped if ending(name) == kind).removeprefix(prefix)
    if not kind:
        advice = "files without an ending must be renamed"
    elif any(example.lower().endswith(each) for each in ARCHIVES):
        advice = "unpack archives first"
    elif kind in PHOTOS:
        advice = f"{kind[1:].upper()} must be converted first"
    else:
        advice = f"{kind} is not read"
    count = f"{meant[kind]:,} file{'s' * (meant[kind] > 1)}"
    return f", but {count} such as {example}; images end in {', '.join(sorted(EXTENSIONS))}; {advice}"


def notes_about_boxes(listing: FolderListing, splits: dict[str, str], classes: tuple[str, ...]) -> list[str]:
    """Returns a note where images without classes lie beside labels of another kind: boxes, masks, or a table."""
    if classes:
        return []
    beside = {parent for folder in splits.values() for parent in ("", os.path.dirname(folder))}
    found, tables = [], []
    for folder in sorted(beside):
        with os.scandir(listing.path(folder)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                shown = os.path.join(folder, entry.name)
                if entry.is_dir() and entry.name.lower() in {"labels", "annotations"}:
                    found.append(f"{shown}/")
                elif folder == "" and _may_hold_labels(entry.name, tables_too=splits != {"train": ""}):
                    tables.append(shown)
    notes = []
    # Names such as train.csv first; a sample_submission.csv has no labels.
    tables.sort(key=lambda name: ("train" not in name and "label" not in name, name))
    if found:
        notes.append(f"{listing.root}: {found[0]} (boxes or masks) is not read, so all images are unlabelled")
    if tables:
        notes.append(f"{listing.root}: {tables[0]} is not read; labels come from folder names, <class>/*.jpg")
    return notes


def _may_hold_labels(name: str, *, tables_too: bool) -> bool:
    """Returns whether a file may list labels; tables among unlabelled images have a note of their own."""
    stem, kind = os.path.splitext(name.lower())
    listed = kind == ".txt" and (says_split(stem) is not None or "label" in stem or "annotation" in stem)
    return listed or (tables_too and kind in TABLES)


def note_about_names(listing: FolderListing, names: Sequence[str]) -> list[str]:
    """Returns a note where unlabelled images seem to be named by their classes, or by folders that were lost."""
    if all("\\" in name for name in names):
        return [
            f"WARNING: {listing.root}: names such as {names[0]} hold folders, lost in unpacking; unpack it with unar "
            "or 7z"
        ]
    some = [os.path.basename(name) for name in names[:: len(names) // 1000 + 1]]
    found = [re.fullmatch(r"([^\W\d_]{2,})[ ._-]*\(?\d+\)?\.\w+", name) for name in some]
    counts = Counter(match[1] for match in found if match)
    # Two at least, or the word is the camera's: IMG_0001, DSC_0001.
    if len(found) < 4 or None in found or not 2 <= len(counts) <= len(found) // 2:
        return []
    return [
        f"{listing.root}: names such as {some[0]} seem to begin with the class, which is not read; labels come from "
        "folder names, <class>/*.jpg"
    ]

"""Lists folders of images, in every common layout."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from funmatch.data.dataset import UNLABELLED, Dataset, SplitListing, Track, check_classes, read_file, sort_splits
from funmatch.data.readers import not_images
from funmatch.data.readers.class_notes import class_notes, first_of, folders_in_classes
from funmatch.data.readers.folder_listing import FolderListing
from funmatch.data.readers.layout import Layout, check_not_masks, find_layout
from funmatch.data.remote.fetch import AS_FOLDER, fetch
from funmatch.errors import InputError, hide_secrets

EXPECTED = "expected <split>/<class>/*.jpg, <class>/*.jpg, or a folder of unlabelled images"


def open_folder(
    root: Path, *, follow_links: bool = False, recommend_reader: Callable[[Path], str] = lambda _: ""
) -> Dataset:
    """Lists a folder of images.

    Args:
        root: a folder in one of these layouts.
            `<split>/<class>/…`: splits train, val or validation, test; each holds either a folder per class, with
            images at any depth, or only images, which are unlabelled. Folders such as `seg_train` and `test2017` are
            splits too, with a note.
            `<class>/…`: at least two folders and no images beside them; all are training images.
            Either of them inside folders that hold nothing else, such as `archive/`.
            Otherwise, images at any depth, unlabelled, all for training.
            Files that are not images are skipped, with a note.
        follow_links: whether symbolic links may lead out of the folder.
        recommend_reader: given a path without images, returns advice for the error message.

    Raises:
        InputError: there is no folder or no image in it, images lie beside class folders, classes differ only in
            case, a link leads out of the folder, or folders name splits in several ways.
    """
    if not root.is_dir():
        raise InputError(not_images.describe_file(root, recommend_reader))
    listing = FolderListing(str(root), follow_links)
    layout = find_layout(listing)
    # A new split would appear here.
    listing.watched.append(str(root))
    if not layout.splits:
        return _without_splits(root, listing, layout, recommend_reader)
    # Where it looked through folders, a new one beside them would change what is read.
    if layout.notes:
        listing.watched += sorted(
            {str(root / p) for f in layout.splits.values() for p in Path(f).parents} - {str(root)}
        )
    # Of all splits together: a class that one split lacks must not move the numbers of the others.
    classes = tuple(sorted({name for names in layout.classes.values() for name in names}))
    splits = {
        split: _list_split(listing, layout.splits[split], layout.classes[split], classes) for split in layout.splits
    }
    notes = [*layout.notes, *not_images.notes_about_boxes(listing, layout.splits, classes)]
    notes += folders_in_classes(listing, list(layout.splits.values()), classes)
    return _dataset(root, listing, classes, sort_splits(splits), notes)


def open_remote_folder(
    address: str, track: Track, *, follow_links: bool, recommend_reader: Callable[[Path], str]
) -> Dataset:
    """Lists a folder of images on a server, or in an archive there, from its copy on this machine.

    Args:
        address: of a folder of a bucket, or of an archive.
        track: shows the progress of a download.
        follow_links, recommend_reader: as for `open_folder`.

    Raises:
        InputError: it cannot be read, or as for `open_folder`; the message has the address in place of the copy's path.
    """
    root, shown = fetch(address, AS_FOLDER, track).folder, hide_secrets(address)
    if root.is_file():
        raise InputError(f"{shown} is a file; expected a folder of images, or an archive of one")
    try:
        found = open_folder(root, follow_links=follow_links, recommend_reader=recommend_reader)
    except InputError as error:
        raise InputError(str(error).replace(str(root), shown)) from None
    notes = [note.replace(str(root), shown) for note in found.notes]
    if shown.endswith(".tar") and not found.classes:
        notes.append(f"{shown}: read as an archive of a folder; if it is a WebDataset shard, pass wds:{shown}")
    return replace(found, location=shown, notes=tuple(notes))


def _without_splits(
    root: Path, listing: FolderListing, layout: Layout, recommend_reader: Callable[[Path], str]
) -> Dataset:
    top, prefix = layout.top, f"{layout.top}/" if layout.top else ""
    loose = listing.images(top, deep=False)
    folders = listing.folders(top)
    inside = {folder: names for folder in folders if (names := listing.images(prefix + folder))}
    names = loose + [name for images in inside.values() for name in images]
    if not names:
        advice = recommend_reader(root)
        found = f"; {advice}; otherwise " if advice else f"{not_images.describe_skipped(listing)}; "
        raise InputError(f"{root} has no images{found}{EXPECTED}")
    # A single class cannot be learned, so one folder alone is taken for a container of images.
    if loose or len(inside) < 2:
        splits = {"train": SplitListing(sorted(names), np.full(len(names), UNLABELLED, np.int32))}
        why = f"images lie beside folders, e.g. {loose[0]}" if loose else "only one folder has images"
        notes = [f"{root}: {why}, so folders are not read as classes and all images are unlabelled"] if inside else []
        notes += not_images.notes_about_boxes(listing, {"train": ""}, ())
        return _dataset(root, listing, (), splits, notes)
    check_not_masks(listing, top, list(inside))
    classes = check_classes(sorted(inside), root)
    # In the order of `classes`, which is that of the names below.
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(inside[name]) for name in classes])
    splits = {"train": SplitListing([name for c in classes for name in inside[c]], labels)}
    notes = [*layout.notes, *folders_in_classes(listing, [top], classes)]
    if empty := [folder for folder in folders if folder not in inside]:
        notes.append(f"{root}: folders without images are no classes: {first_of(empty)}")
    return _dataset(root, listing, classes, splits, notes)


def _dataset(
    root: Path,
    listing: FolderListing,
    classes: tuple[str, ...],
    splits: dict[str, SplitListing],
    notes: list[str],
) -> Dataset:
    def read(split: str, index: int) -> bytes:
        return read_file(os.path.join(listing.root, splits[split].names[index]))

    notes = [*notes, *listing.notes(), *class_notes(root, classes, splits)]
    if not classes:
        notes += listing.table_notes()
        notes += not_images.note_about_names(listing, next(iter(splits.values())).names)
    return Dataset(root.resolve().name, classes, splits, read, listing.watched, notes=tuple(notes), location=str(root))


def _list_split(listing: FolderListing, folder: str, inner: Sequence[str], classes: tuple[str, ...]) -> SplitListing:
    where = listing.path(folder)
    # Without classes, folders may still hold images: those of a split that is taken as unlabelled.
    loose = listing.images(folder, deep=not inner)
    if loose and inner:
        raise InputError(
            f"{where} has {len(loose)} images beside class folders ({loose[0]}, …); move them into a class folder, or "
            "move the class folders out"
        )
    names, labels = list(loose), [UNLABELLED] * len(loose)
    for name in inner:
        images = listing.images(f"{folder}/{name}")
        names, labels = names + images, labels + [classes.index(name)] * len(images)
    if not names:
        raise InputError(
            f"{where} has no images{not_images.describe_skipped(listing, folder)}; add some, or remove this split"
        )
    return SplitListing(names, np.array(labels, np.int32))

"""Prepares data sets before training: downloads, checks, decodes and caches images, and summarises them."""

from typing import Any

import numpy as np

from funmatch.config import Prepare
from funmatch.data.cache.open_cache import Cache
from funmatch.data.dataset import NAMED_AT_MOST
from funmatch.data.readers.catalog import CATALOG
from funmatch.data.shard_images import Resizing
from funmatch.data.write_tfrecords import write_shards
from funmatch.errors import printable
from funmatch.reports.result import Result
from funmatch.runtime.log import info, out, print_table, track
from funmatch.training import datasets

LISTED = 20
UNEQUAL = 5
"""Images of the largest class for one of the smallest, from which the remedies are named."""


def run(config: Prepare) -> Result:
    """Downloads a data set, reads every file, and caches it decoded, or writes it as TFRecord shards.

    Returns:
        the summary of `summarize`; for shards also `shards`, their paths.
    """
    if config.to == "tfrecord":
        assert config.out is not None  # `Prepare.check` requires it
        shards = write_shards(
            config.data,
            datasets.read_options(config),
            datasets.cache_options(config),
            config.out.expanduser(),
            resizing=Resizing(config.side, config.fit, config.resample) if config.side else None,
            size=config.shard_size,
            track=track,
        )  # fmt: skip
        # Caches say theirs when they are opened.
        for note in shards["notes"]:
            info(note if note.startswith("WARNING: ") else f"note: {note}")
        return Result(config.out.expanduser(), shards)
    # Read again, although it may be cached: this command is how users look at files that they have changed.
    return Result(None, summarize(datasets.open_data_set(config, config.data, refresh=True), config.data))


def summarize(cache: Cache, data: tuple[str, ...]) -> dict[str, Any]:
    """Summarises a data set: the result of its scan, its place and size, and `class_sizes`."""
    size = sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file())
    place = {"name": cache.name, "data": list(data), "way": cache.way, "folder": str(cache.folder)}
    sizes = {"gigabytes": round(size / 1e9, 6), "class_sizes": class_sizes(cache)}
    return place | sizes | ({} if cache.task == "multiclass" else {"task": cache.task}) | cache.summary


def class_sizes(cache: Cache) -> dict[str, dict[str, Any]]:
    """Returns the smallest and the largest class of each labelled split, as [name, images], and their ratio."""
    sizes = {}
    for name, split in cache.splits.items():
        if not split.labelled or len(cache.classes) < 2:
            continue
        counts = split.class_counts(len(cache.classes))
        # Classes without an image are told elsewhere; a ratio to nothing would say nothing.
        present = np.flatnonzero(counts)
        low, high = (int(present[pick(counts[present])]) for pick in (np.argmin, np.argmax))
        ends = {"smallest": [cache.classes[low], int(counts[low])], "largest": [cache.classes[high], int(counts[high])]}
        sizes[name] = ends | {"ratio": round(float(counts[high] / counts[low]), 2)}
    return sizes


def show(result: Result) -> None:
    """Prints the summary of a data set."""
    summary = result.metrics
    published = summary["published"]
    rows = []
    for split, about in summary["splits"].items():
        expected = published.get(split)
        rows.append(
            [
                split,
                f"{about['pictures']:,}",
                f"{about['classes']:,}" if about["labelled"] else "unlabelled",
                ""
                if expected is None
                else "as expected"
                if expected == about["pictures"]
                else f"should be {expected:,}",
            ]
        )
    # Only data sets of the catalog have published counts.
    columns = ["split", "images", "classes", "expected"][: 4 if published else 3]
    print_table(summary["name"], columns, [row[: len(columns)] for row in rows])
    for line in _describe(summary):
        # Soft, so that paths are not cut into lines.
        out.print(printable(line), soft_wrap=True)


def _describe(summary: dict[str, Any]) -> list[str]:
    """Describes classes, image sizes, problems, licence and folder of a data set, one fact per line."""
    lines = []
    if classes := summary["classes"]:
        more = f", … ({len(classes)} in all)" if len(classes) > LISTED else ""
        lines.append(f"classes: {', '.join(classes[:LISTED])}{more}")
    for split, sizes in summary.get("class_sizes", {}).items():
        (low, fewest), (high, most) = sizes["smallest"], sizes["largest"]
        counts = (
            f"{fewest:,} each" if fewest == most else f"{fewest:,} ({low}) … {most:,} ({high}), 1 : {sizes['ratio']:g}"
        )
        lines.append(f"images per class of {split}: {counts}")
        if split == "train" and sizes["ratio"] >= UNEQUAL:
            # Batches cannot hold all classes equally often where images have several.
            batches = "" if "task" in summary else " or --sampling balanced (in the batches)"
            lines.append(
                "the classes are unequal: train and finetune count them equally with --class-weights balanced (in the "
                f"loss){batches}"
            )
    for name in ("short_side", "long_side"):
        low, middle, high = summary[name]
        lines.append(f"{name.replace('_', ' ')}: {low} … {high} pixels, median {middle}")
    if summary["kinds"]:
        lines.append("file formats: " + ", ".join(f"{count:,} {kind}" for kind, count in summary["kinds"].items()))
    if summary["repeated"]:
        lines.append(f"duplicates within a split: {summary['repeated']:,} images")
    if twice := summary["contradictory"]["pictures"]:
        lines.append(f"CONTRADICTION: {twice:,} identical images have different labels:")
        lines += [f"  {one} = {other}" for one, other in summary["contradictory"]["examples"]]
    # Stated, since silence would not tell whether it was checked.
    if not summary["leaks"] and len(summary["splits"]) > 1:
        lines.append("no image is in more than one split")
    lines += _leaks(summary) + _unreadable(summary)
    for spec in summary["data"]:
        if spec in CATALOG:
            entry = CATALOG[spec]
            lines.append(f"{entry.title}. {entry.citation}. Licence: {entry.licence}.")
    for name in ("sheet", "folder"):
        if name in summary:
            lines.append(f"{name}: {summary[name]}")
    if "shards" in summary:
        lines.append(f"shards: {len(summary['shards']):,} in {summary['folder']}")
    elif "way" in summary:
        lines.append(f"cached {summary['way']}, {summary['gigabytes']:.2g} GB")
    return lines


def _leaks(summary: dict[str, Any]) -> list[str]:
    lines = []
    for pair, leak in summary["leaks"].items():
        lines.append(f"LEAK: {leak['pictures']:,} images are both in {pair}:")
        lines += [f"  {one} = {other}" for one, other in leak["examples"]]
    return lines


def _unreadable(summary: dict[str, Any]) -> list[str]:
    bad = summary["unreadable"]
    lines = [f"unreadable images, skipped: {len(bad):,}"] if bad else []
    lines += [f"  {name}: {reason}" for name, reason in bad[:NAMED_AT_MOST]]
    return lines + (
        [f"  … and {len(bad) - NAMED_AT_MOST:,} more; --json lists all"] if len(bad) > NAMED_AT_MOST else []
    )

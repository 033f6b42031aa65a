"""Making images ready before a run needs them, and saying what they are."""

from typing import Any

from funmatch.config import Prepare
from funmatch.data.cache.open_cache import Cache
from funmatch.data.dataset import NAMED_AT_MOST
from funmatch.data.readers.catalog import CATALOG
from funmatch.data.write_tfrecords import write_shards
from funmatch.reports.result import Result
from funmatch.runtime.log import out, print_table, track
from funmatch.training import datasets

LISTED = 20


def run(config: Prepare) -> Result:
    """Fetches a data set, reads every file, and keeps it decoded, or writes it as shards.

    Returns:
        what `figures` gives; for shards also `shards`, their paths.
    """
    if config.to == "tfrecord":
        assert config.out is not None  # checked above
        shards = write_shards(
            config.data,
            datasets.read_options(config),
            datasets.cache_options(config),
            config.out.expanduser(),
            side=config.side,
            size=config.shard_size,
            track=track,
        )  # fmt: skip
        return Result(config.out.expanduser(), shards)
    return Result(None, summarize(datasets.open_data_set(config, config.data, refresh=True), config.data))


def summarize(cache: Cache, data: tuple[str, ...]) -> dict[str, Any]:
    """What a data set holds, as `survey.summary` says, with `name`, `data`, `way`, `folder` and `gigabytes`."""
    size = sum(path.stat().st_size for path in cache.folder.iterdir())
    place = {"name": cache.name, "data": list(data), "way": cache.way, "folder": str(cache.folder)}
    return place | {"gigabytes": round(size / 1e9, 6)} | cache.summary


def show(result: Result) -> None:
    """Prints what a data set holds."""
    figures = result.metrics
    published = figures["published"]
    rows = []
    for split, about in figures["splits"].items():
        expected = published.get(split)
        rows.append(
            [
                split,
                f"{about['pictures']:,}",
                f"{about['classes']:,}" if about["labelled"] else "unlabelled",
                "" if expected is None else "as expected" if expected == about["pictures"] else f"not {expected:,}",
            ]
        )
    columns = ["split", "pictures", "classes", "expected"][: 4 if published else 3]
    print_table(figures["name"], columns, [row[: len(columns)] for row in rows])
    lines = []
    if classes := figures["classes"]:
        more = f", … ({len(classes)} in all)" if len(classes) > LISTED else ""
        lines.append(f"classes: {', '.join(classes[:LISTED])}{more}")
    for name in ("short_side", "long_side"):
        low, middle, high = figures[name]
        lines.append(f"{name.replace('_', ' ')}: {low} … {high} pixels, median {middle}")
    if figures["kinds"]:
        lines.append("kinds: " + ", ".join(f"{count:,} {kind}" for kind, count in figures["kinds"].items()))
    if figures["repeated"]:
        lines.append(f"repeated inside a split: {figures['repeated']:,} images")
    if twice := figures["contradictory"]["pictures"]:
        lines.append(f"CONTRADICTION: {twice:,} images are the same with different labels:")
        lines += [f"  {one} = {other}" for one, other in figures["contradictory"]["examples"]]
    if not figures["leaks"] and len(figures["splits"]) > 1:
        lines.append("no image is in two splits")
    lines += _leaks(figures) + _unreadable(figures)
    for spec in figures["data"]:
        if spec in CATALOG:
            entry = CATALOG[spec]
            lines.append(f"{entry.title}. {entry.citation}. Licence: {entry.licence}.")
    for name in ("sheet", "folder"):
        if name in figures:
            lines.append(f"{name}: {figures[name]}")
    if "shards" in figures:
        lines.append(f"shards: {len(figures['shards']):,} in {figures['folder']}")
    elif "way" in figures:
        lines.append(f"kept {figures['way']}, {figures['gigabytes']:.2g} GB")
    for line in lines:
        out.print(line, soft_wrap=True)


def _leaks(figures: dict[str, Any]) -> list[str]:
    lines = []
    for pair, leak in figures["leaks"].items():
        lines.append(f"LEAK: {leak['pictures']:,} images are both in {pair}:")
        lines += [f"  {one} = {other}" for one, other in leak["examples"]]
    return lines


def _unreadable(figures: dict[str, Any]) -> list[str]:
    bad = figures["unreadable"]
    lines = [f"unreadable and skipped: {len(bad):,}"] if bad else []
    lines += [f"  {name}: {reason}" for name, reason in bad[:NAMED_AT_MOST]]
    return lines + ([f"  … and {len(bad) - NAMED_AT_MOST:,} more; --json has all"] if len(bad) > NAMED_AT_MOST else [])

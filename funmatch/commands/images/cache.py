"""Shows what the cache holds, and clears what nobody needs."""

from typing import Any

from funmatch.config import Cache
from funmatch.data.cache.inventory import Item, list_items, remove_item
from funmatch.reports.result import Result
from funmatch.runtime.disk.files import cache_home
from funmatch.runtime.log import print_line, print_table
from funmatch.runtime.text import format_bytes


def run(config: Cache) -> Result:
    """Lists the items of the cache, and removes those that the options choose.

    Returns:
        `folder`, `bytes` of what stays, `items`, each with `name`, `path`, `bytes`, `days` since it was last used,
        `missing` (its images are gone) and `removed`; and `freed` bytes.
    """
    home = cache_home()
    items = list_items(home)
    removed = [item for item in items if is_chosen(item, config)]
    for item in removed:
        remove_item(item)
    shown = [_entry(item, removed=item in removed) for item in items]
    freed = sum(item.bytes for item in removed)
    stays = sum(item.bytes for item in items) - freed
    return Result(None, {"folder": str(home), "bytes": stays, "freed": freed, "items": shown})


def is_chosen(item: Item, config: Cache) -> bool:
    """Returns whether an item is to be removed: all that are chosen by every option that is set."""
    tests = [config.everything, config.older_than is not None, config.missing]
    old = config.older_than is None or item.days > config.older_than
    return any(tests) and old and (item.missing or not config.missing)


def _entry(item: Item, *, removed: bool) -> dict[str, Any]:
    return {
        "name": item.name, "path": str(item.path), "bytes": item.bytes, "days": round(item.days, 2),
        "missing": item.missing, "removed": removed,
    }  # fmt: skip


def show(result: Result) -> None:
    """Prints the items, the largest first, and what was freed."""
    found = result.metrics
    rows = [
        [
            each["name"],
            format_bytes(each["bytes"]),
            f"{each['days']:.0f} days ago" if each["days"] >= 1 else "today",
            "removed" if each["removed"] else "images gone" if each["missing"] else "",
        ]
        for each in found["items"]
    ]
    if rows:
        print_table(f"cache in {found['folder']}", ["what", "size", "last used", ""], rows)
    print_line(f"{format_bytes(found['bytes'])} in {found['folder']}")
    if found["freed"]:
        print_line(f"removed {format_bytes(found['freed'])}")
    elif any(each["missing"] for each in found["items"]):
        print_line("`funmatch cache --missing` removes what was made from images that are gone")

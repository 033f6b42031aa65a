"""Recognizes the names of splits in names of folders and files: `train`, `Validation`, `seg_train`, `test2017`."""

import re
from collections.abc import Callable, Sequence

from funmatch.errors import InputError

TRAINING_IMAGES = "training images"
"""Name of a split of images that a model is trained on and evaluated on all the same, so that its metrics are nowhere
taken for those of other images."""
SPLIT_NAMES = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# Only in names that say nothing else, or where all folders agree: as a part of other names they may mean anything.
WORDS = SPLIT_NAMES | {"trainval": "train", "eval": "eval", "evaluation": "eval"}
SHORT = {"tr": "train", "va": "val", "vl": "val", "te": "test", "ts": "test"}
FILLERS = {
    "set", "sets", "seg", "split", "data", "dataset", "folder", "dir", "the", "my", "new", "final", "full", "raw",
    "all", "image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos", "jpg",
    "jpeg", "png", "original", "resized", "cropped", "processed", "labeled", "labelled", "x",
}  # fmt: skip
"""Words that stand beside that of a split without making it the name of something else, as "station" would."""
CONTAINERS = {
    "image", "images", "img", "imgs", "jpegimages", "jpg", "jpgs", "jpeg", "png", "pngs", "picture", "pictures",
    "photo", "photos", "data", "dataset", "all", "all images", "test images", "train images",
}  # fmt: skip
"""Names of folders that hold images and name no class."""


def find_split(words: Sequence[str]) -> str | None:
    """Returns the split that the first matching word names, or None."""
    return next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), None)


def words_of(name: str) -> list[str]:
    """Splits a name into lower-case words: `TrainSet-2017` to train, set, 2017; `testdata` to test, data."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])", " ", name)
    words = [word.lower() for word in re.split(r"[\W_]+", apart) if word]
    # `trainset`, `testdata`: two words that are written as one.
    glued = rf"({'|'.join(sorted(WORDS, key=len, reverse=True))})(sets?|data|images?|imgs?|split)"
    return " ".join(re.sub(rf"^{glued}$", r"\1 \2", word) for word in words).split()


def is_container(name: str) -> bool:
    """Returns whether a folder's name says only that images are in it."""
    return " ".join(words_of(name)) in CONTAINERS


def split_word(name: str, table: dict[str, str] = WORDS) -> tuple[str, str] | None:
    """Returns the split that a name has the word of, `eval` too, and the rest of the name; None unless it is one."""
    words = words_of(name)
    splits = [word for word in words if word in table]
    if len(splits) != 1:
        return None
    rest = [word for word in words if word != splits[0] and word not in FILLERS and not word.isdecimal()]
    return table[splits[0]], " ".join(rest)


def says_split(name: str) -> str | None:
    """Returns the split that a name says, where it says nothing else: `seg_train`, not `bullet_train`."""
    found = split_word(name)
    return found[0] if found and not found[1] else None


def assign_splits(names: Sequence[str], has_images: Callable[[str], bool], where: object) -> dict[str, str]:
    """Finds the folders that are splits.

    Args:
        names: of all folders in one folder.
        has_images: whether a folder has images; asked only where it matters, since it takes time.
        where: the folder that holds them, for messages.

    Returns:
        the folder's name by split; empty where no folder names a split.

    Raises:
        InputError: several folders name the same split, or folders name a class and a split at once.
    """
    found = [(SPLIT_NAMES[name.lower()], name) for name in names if name.lower() in SPLIT_NAMES]
    found += [(split, name) for name in names if name.lower() not in SPLIT_NAMES and (split := says_split(name))
              and has_images(name)]  # fmt: skip
    if not found:
        found = _with_common_rest(names, has_images, where)
    # One folder test_images alone is what somebody has, not what is held out from training.
    if len(found) == 1 and found[0][1].lower() not in SPLIT_NAMES and found[0][0] != "train":
        found = found if any(has_images(name) for name in names if name != found[0][1]) else []
    taken = {split for split, _ in found}
    # Beside a validation split, "evaluation" is the final one (Food-11); alone, it is what is evaluated on.
    of_eval = "test" if "val" in taken and "test" not in taken else "val"
    splits: dict[str, str] = {}
    # Beside both, nobody but the user knows what it is: it stays a folder beside the splits.
    for split, name in [each for each in found if each[0] != "eval" or not {"val", "test"} <= taken]:
        split = of_eval if split == "eval" else split
        if split in splits:
            raise InputError(
                f"{where} has both {splits[split]}/ and {name}/ for one split; keep one, or put their images together"
            )
        splits[split] = name
    return splits


def _with_common_rest(names: Sequence[str], has_images: Callable[[str], bool], where: object) -> list[tuple[str, str]]:
    """Finds splits by what differs between all folders: `dogs_train` and `dogs_test`; `tr` and `te`."""
    for table in (WORDS, SHORT):
        words = {name: word for name in names if (word := split_word(name, table))}
        # Before looking for images: nearly all folders of classes end here.
        if len({split for split, _ in words.values()}) < 2 or any(
            has_images(name) for name in names if name not in words
        ):
            continue
        words = {name: word for name, word in words.items() if has_images(name)}
        splits, rests = [split for split, _ in words.values()], [rest for _, rest in words.values()]
        if len(words) > 1 and len(set(rests)) == 1 and len(set(splits)) == len(splits):
            return [(split, name) for name, (split, _) in words.items()]
        # The same rest with two splits: cats_train, cats_test, dogs_train, dogs_test.
        if len(set(splits)) > 1 and len(set(rests)) < len(rests):
            raise InputError(
                f"the folders of {where} name a class and a split at once ({', '.join(list(words)[:4])}); arrange them "
                "as <split>/<class>/, such as train/cat/"
            )
    return []


def describe_images(count: int, split: str, held_out_of: int | None = None) -> str:
    """Returns the number of images and their split in words, for messages.

    Args:
        held_out_of: number of training images that the split was held out of, None for a split of the data's own.
    """
    if split == TRAINING_IMAGES:
        return f"{count:,} {split}"
    more = f", held out of {held_out_of:,}" if held_out_of else ""
    return f"{count:,} images of {split}{more}"

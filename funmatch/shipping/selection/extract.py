"""Writes images of any source as files, under names that their content decides."""

import hashlib
from io import BytesIO
from pathlib import Path

from PIL import Image

from funmatch.data.cache.scan import reason_of
from funmatch.errors import InputError
from funmatch.runtime.disk.files import disk_errors, write_atomically
from funmatch.shipping.sources.files import ImageFile

ENDINGS = {
    "JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "PPM": ".ppm", "TIFF": ".tif",
    "GIF": ".gif", "AVIF": ".avif", "JPEG2000": ".jp2",
}  # fmt: skip
"""Endings of files by Pillow's names of formats."""


def extract(image: ImageFile, folder: Path) -> Path:
    """Writes an image into a folder, as it is encoded, unless it is there; returns its path.

    Raises:
        InputError: it cannot be read.
    """
    try:
        content = image.read()
        with Image.open(BytesIO(content)) as opened:
            kind = str(opened.format)
    except Exception as error:  # it was readable before, so the image itself is not at fault
        raise InputError(f"{image.path}: {reason_of(error)}; it was readable before. Start the command again") from None
    # By content: names in shards may repeat, and the same command again writes the same files.
    name = hashlib.blake2b(content, digest_size=16).hexdigest()
    path = folder / f"{name}{ENDINGS.get(kind, '.' + kind.lower())}"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomically(path, content)
    return path

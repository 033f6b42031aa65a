"""Makes `docs/report.png`: the upper part of the demo's report, photographed by a headless Chromium.

python scripts/screenshot.py                    runs `funmatch demo` first, which takes minutes
python scripts/screenshot.py runs/demo/report.html
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

TARGET = Path(__file__).parent.parent / "docs" / "report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = 1200, 1010
"""Width and height in pixels: down to the curves."""
COLORS = 64
"""Colours of the picture; more do not show, and cost space in the repository."""
LIMIT = 200_000
"""Bytes of the file, at most."""


def photograph(page: Path, target: Path) -> None:
    """Writes a picture of the upper part of a page.

    Raises:
        SystemExit: there is no browser, or the picture is too large.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)}")
    with TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        size = f"--window-size={SIZE[0]},{SIZE[1]}"
        # Without a sandbox, which containers do not allow: the page is our own and loads nothing.
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size, f"--screenshot={shot}"]
        subprocess.run([browser, *options, page.resolve().as_uri()], check=True, capture_output=True)
        Image.open(shot).convert("RGB").quantize(COLORS).save(target, optimize=True)
    if target.stat().st_size > LIMIT:
        sys.exit(f"{target} has {target.stat().st_size:,} bytes, more than {LIMIT:,}")


if __name__ == "__main__":
    if sys.argv[1:]:
        photograph(Path(sys.argv[1]), TARGET)
    else:
        with TemporaryDirectory() as runs:
            subprocess.run([sys.executable, "-m", "funmatch", "demo", "--out", runs], check=True)
            photograph(Path(runs) / "report.html", TARGET)

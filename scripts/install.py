"""Installs funmatch, editable, into the environment whose Python runs this; `make` calls it.

uv does it, which pip gets first: it downloads and unpacks several packages at a time. Where uv cannot be had or
fails, as behind a mirror that only pip's settings name, pip does it. Both print a line or more for each of 130
packages, in which errors are easy to miss. So their output goes to install.log in the environment; the terminal shows
the current package, and the end of the output if the installation fails.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ("hatchling", "editables")  # the build backend; installed first, so that it is pinned as the rest is
SIZE = r"\(([\d.]+) ?([kMG]B|[KMG]iB)\)"
BY_PIP = re.compile(rf"(?:Downloading|Using cached) (\S+?)-\d\S* {SIZE}")
BY_UV = re.compile(rf"Downloading (\S+) {SIZE}")
MB = {"kB": 1e-3, "MB": 1.0, "GB": 1e3, "KiB": 1.024e-3, "MiB": 1.049, "GiB": 1073.7}
FAILED = "WARNING: uv failed; pip installs instead"


class Progress:
    """Shows the current package: a line updated twice a second on a terminal, elsewhere a line every half minute."""

    def __init__(self) -> None:
        self.began, self.total, self.now = time.monotonic(), 0.0, "looking up versions"
        self.sizes: dict[str, float] = {}
        self.drawn, self.over = sys.stdout.isatty(), threading.Event()
        self.clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Progress":
        self.clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.clock.join()
        if self.drawn:
            print("\r\033[K", end="", flush=True)

    def see(self, line: str) -> None:
        """Reads a line of pip's or uv's output."""
        if found := BY_PIP.search(line):
            self._count(found[1], float(found[2]) * MB[found[3]])
        elif found := BY_UV.search(line):  # many at once, each of which is there when uv names it again
            self.sizes[found[1]] = float(found[2]) * MB[found[3]]
        elif line.startswith(" Downloaded "):
            self._count(line.split()[1], self.sizes.pop(line.split()[1], 0.0))
            if self.sizes:
                name, size = max(self.sizes.items(), key=lambda each: each[1])
                self.now = f"{name} ({size:,.0f} MB)"
        elif line.startswith(("Collecting ", "Processing ")):  # the second is of a file on this machine
            self.now = Path(line.split()[1]).name
        elif line.startswith(("Installing collected packages", "Prepared ")):
            self.now = "unpacking"

    def _count(self, name: str, size: float) -> None:
        self.total += size
        self.now = f"{name} ({size:,.0f} MB)" if size >= 1 else name

    def _tick(self) -> None:
        while not self.over.wait(0.5 if self.drawn else 30):
            minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
            line = f"  {minutes}:{seconds:02d}  {self.total / 1e3:.1f} GB  {self.now}"
            if self.drawn:
                print(f"\r\033[K{line}"[: os.get_terminal_size().columns], end="", flush=True)
            else:
                print(line, flush=True)


def main() -> None:
    """Installs, and exits with the exit code of what installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extras", default="", help="extras of pyproject.toml, e.g. test")
    parser.add_argument("--versions", choices=("pinned", "floors", "newest"), default="pinned")
    options = parser.parse_args()
    log = Path(sys.prefix) / "install.log"
    log.write_text("")
    constraints = None if options.versions == "newest" else ROOT / "constraints.txt"
    if options.versions == "floors":
        constraints = Path(sys.prefix) / "floors.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in floors(ROOT / "pyproject.toml")))
    versions = {"pinned": "pinned", "floors": "oldest allowed", "newest": "newest"}[options.versions]
    size = "5 GB on Linux, most of it CUDA's" if sys.platform == "linux" else "1.5 GB"
    print(f"Installing funmatch into {Path(sys.prefix).name}, {versions} versions: the first time up to {size};")
    print(f"about ten minutes at 100 Mbit/s, and seconds from the cache. The output is in {log}", flush=True)
    target = f"{ROOT}[{options.extras}]" if options.extras else str(ROOT)
    with Progress() as progress:
        code = run(pip(("uv",), ROOT / "constraints.txt"), log, progress)
        code = code or install(uv, target, constraints, log, progress)
        if code:
            with log.open("a") as file:
                file.write(f"{FAILED}\n")
            code = install(pip, target, constraints, log, progress)
    if code:
        output = [line for line in log.read_text().splitlines() if not line.startswith("WARNING:")]
        print("\n".join(output[-25:]))
        print(f"pip failed with exit code {code}; its output is in {log}")
    else:
        print(f"Installed in {int(time.monotonic() - progress.began)} s.")
    sys.exit(code)


def floors(project: Path) -> list[tuple[str, str]]:
    """The lower bounds that pyproject.toml names: (package, version)."""
    table = tomllib.loads(project.read_text())["project"]
    requirements = [
        *table["dependencies"],
        *(each for extra in table["optional-dependencies"].values() for each in extra),
    ]
    return [tuple(each.split(">=")) for each in requirements if ">=" in each]


def install(
    by: Callable[[tuple[str, ...], Path | None], list[str]], target: str, constraints: Path | None, log: Path,
    progress: Progress,
) -> int:  # fmt: skip
    """Installs what builds the package, then the package; returns an exit code."""
    code = run(by(BUILD, constraints), log, progress)
    return code or run(by(("--no-build-isolation", "--editable", target), constraints), log, progress)


def pip(arguments: tuple[str, ...], constraints: Path | None) -> list[str]:
    """Returns the command of pip that installs something, the newest of it where there are no constraints."""
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", "--no-input"]
    # Without bytecode: Python compiles what it imports, and most of 5 GB is never imported.
    command += ["--no-compile", *arguments]
    newest = ["--upgrade", "--upgrade-strategy", "eager"]
    return command + (["--constraint", str(constraints)] if constraints else newest)


def uv(arguments: tuple[str, ...], constraints: Path | None) -> list[str]:
    """Returns uv's command, as `pip`."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, *arguments]
    return command + (["--constraint", str(constraints)] if constraints else ["--upgrade"])


def run(command: list[str], log: Path, progress: Progress) -> int:
    """Runs a command with its output to the log and to `progress`; returns the exit code."""
    # uv gives up after half a minute without an answer by itself, pip after several tries.
    environment = {"UV_HTTP_TIMEOUT": "180", **os.environ, "UV_NO_PROGRESS": "1"}
    with (
        log.open("a") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        ) as running,
    ):
        for line in running.stdout or ():
            file.write(line)
            progress.see(line)
    return running.returncode


if __name__ == "__main__":
    main()

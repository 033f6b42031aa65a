"""Moves the pinned versions in constraints.txt, and those of the tools that check the code in pyproject.toml.

`make pins` runs it, with uv and packaging in an environment of their own. Arguments are passed to `uv pip compile`.
Without any, everything moves to its newest release; `make pins WORDS='--upgrade-package timm'` moves one package.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT, PINS = ROOT / "pyproject.toml", ROOT / "constraints.txt"
BUILD = ("hatchling", "editables", "uv")  # install.py builds and installs the package with these
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = {
    "Linux x86-64": ("linux", "x86_64"),
    "Linux arm64": ("linux", "aarch64"),
    "macOS arm64": ("darwin", "arm64"),
}
TOOL = re.compile(r'(?m)^(    "([\w-]+)(?:\[[\w,]+\])?)==[^"]+",')
HEADER = f"""\
# What `make demo` and `make test` install, to the version, with Python {", ".join(PYTHONS)}
# on {", ".join(PLATFORMS)}. Written by `make pins`.
"""


def main() -> None:
    """Writes both files, once everything is resolved for every platform."""
    project = PROJECT.read_text()
    wanted = [
        f"sys_platform == '{system}' and platform_machine == '{machine}'" for system, machine in PLATFORMS.values()
    ]
    # A copy in which no tool is pinned; a package without a wheel for one of the platforms is then an error.
    free = TOOL.sub(r'\1",', project) + f"\n[tool.uv]\nrequired-environments = {wanted}\n"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "pyproject.toml").write_text(free)
        (folder / "build.in").write_text("\n".join(BUILD))
        if PINS.exists():  # what does not move stays
            (folder / "pins.txt").write_text(PINS.read_text())
        uv = [Path(sys.executable).with_name("uv"), "pip", "compile", "--universal", "--python-version", PYTHONS[0]]
        uv += ["--extra", "test", "--no-header", "--no-annotate", "--quiet", "--output-file", "pins.txt"]
        subprocess.run([*uv, *(sys.argv[1:] or ["--upgrade"]), "pyproject.toml", "build.in"], cwd=folder, check=True)
        lines = (folder / "pins.txt").read_text().splitlines()
    pins = [(Requirement(line), line) for line in lines if line and not line.startswith("#")]
    version = {pin.name: str(pin.specifier) for pin, _ in pins}
    PROJECT.write_text(TOOL.sub(lambda found: f'{found[1]}{version[found[2]]}",', project))
    PINS.write_text(HEADER + "".join(f"{line}\n" for pin, whole in pins if (line := on_our_platforms(pin, whole))))


def on_our_platforms(pin: Requirement, line: str) -> str:
    """A pin without its marker if every platform needs it; nothing if none does."""
    taken = [
        pin.marker is None
        or pin.marker.evaluate(
            {
                "sys_platform": system,
                "platform_system": system.capitalize(),
                "platform_machine": machine,
                "os_name": "posix",
                "implementation_name": "cpython",
                "platform_python_implementation": "CPython",
                "python_version": python,
                "python_full_version": f"{python}.0",
            }
        )
        for system, machine in PLATFORMS.values()
        for python in PYTHONS
    ]
    return f"{pin.name}{pin.specifier}" if all(taken) else line if any(taken) else ""


if __name__ == "__main__":
    main()

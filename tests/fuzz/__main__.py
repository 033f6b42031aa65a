"""Runs the fuzzers for longer than the tests do, and prints a table."""

import argparse
import sys
import tempfile
from pathlib import Path

from .harness import fuzz
from .targets import TARGETS


def main() -> int:
    """Returns 1 if any case ended in anything but success or our own error."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="cases of each fast target; a tenth of the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=[each.name for each in TARGETS], help="default: all")
    options = parser.parse_args()
    failed = 0
    print(f"{'target':<20}{'cases':>9}{'fine':>9}{'refused':>9}{'failed':>8}{'seconds':>9}", flush=True)
    for target in TARGETS:
        if options.target and target.name not in options.target:
            continue
        with tempfile.TemporaryDirectory() as folder:
            cases = options.cases if target.is_fast else max(1, options.cases // 10)
            found = fuzz(target, Path(folder), cases, options.seed)
        bad = found.failures.total()
        row = f"{found.cases:>9,}{found.fine:>9,}{found.refused:>9,}{bad:>8,}{found.seconds:>9.0f}"
        print(f"{target.name:<20}{row}", flush=True)
        for place, count in found.failures.most_common():
            print(f"  {count:>6} {place}  {found.examples[place]}", flush=True)
        failed += bad
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

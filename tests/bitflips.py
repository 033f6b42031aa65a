"""Flips single bits in the files of a run's folder and classifies what the same command makes of each.

    python tests/bitflips.py --tries 120 --seed 0

Each try copies the run, flips one bit of one file, and repeats the run's command in this process. `unfinished` copies
lack `result.json` and the students, so that the newest checkpoint is used; `finished` copies are whole.
"""

import argparse
import contextlib
import io
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from make_images import FEW
from safetensors.torch import load_file

import funmatch

OPTIONS = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "batch": 8,
    "steps": 6, "save_every": 2, "eval_every": 3, "ema": 0.9, "keep": "best", "log_every": 1,
}  # fmt: skip
SKIPPED = ("report.html", ".begin")
"""Files that are drawn again from others, and those without content."""
STUDENTS = ("student", "student-ema")


def flip(path: Path, bit: int) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def make_unfinished(folder: Path) -> None:
    """Makes a finished run one that was killed after its last checkpoint."""
    (folder / "result.json").unlink()
    for name in STUDENTS:
        shutil.rmtree(folder / name)


def same_students(one: Path, other: Path) -> bool:
    """Returns whether two runs have bitwise equal students."""
    return all(
        path.is_file() and torch.equal(load_file(path)[key], tensor)
        for name in STUDENTS
        for path in [other / name / "model.safetensors"]
        for key, tensor in load_file(one / name / "model.safetensors").items()
    )


def files_of(folder: Path, *, finished: bool) -> list[Path]:
    """Returns the files of a run whose content matters, relative to it; those of its end only if it is finished."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size)
    found = (path for path in found if finished or path.parts[0] not in (*STUDENTS, "result.json"))
    return [path for path in found if path.name not in SKIPPED]


def repeat(folder: Path, options: dict) -> tuple[str, str]:
    """Repeats a run's command; returns "ok", "refused" or "traceback", and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            funmatch.distill(out=folder, **options)
        except funmatch.InputError as error:
            return "refused", said.getvalue() + str(error)
        except Exception as error:  # what a user would see as a traceback
            return "traceback", f"{said.getvalue()}{type(error).__name__}: {error}"
    return "ok", said.getvalue()


def attack(whole: Path, place: Path, file: Path, bit: int, options: dict, *, finished: bool) -> tuple[str, str]:
    """Flips a bit in a copy of a run and repeats its command.

    Returns:
        what happened, and what was said: `mended` (said, and the students equal those of the undamaged run), `said`
        (the best student is lost, and the run ends with another), `refused`, `harmless` (nothing said, nothing
        changed), `silent` (nothing said, but changed) or `traceback`.
    """
    shutil.copytree(whole, place)
    if not finished:
        make_unfinished(place)
    flip(place / file, bit)
    outcome, said = repeat(place, options)
    if outcome == "ok":
        equal = same_students(whole, place)
        noticed = "WARNING" in said or "damaged" in said
        lost = "no undamaged checkpoint has its best student" in said
        outcome = ("mended" if noticed else "harmless") if equal else "said" if lost else "silent"
    shutil.rmtree(place)
    return outcome, said


def tries(whole: Path, count: int, seed: int) -> Iterator[tuple[Path, int, bool]]:
    """Draws files, bits, and whether the run is finished; each file is as likely as any other."""
    draw = random.Random(seed)
    for number in range(count):
        finished = number % 2 == 1
        file = draw.choice(files_of(whole, finished=finished))
        yield file, draw.randrange((whole / file).stat().st_size * 8), finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as home:
        whole = Path(home) / "run"
        repeat(whole, OPTIONS)
        for number, (file, bit, finished) in enumerate(tries(whole, given.tries, given.seed)):
            outcome, said = attack(whole, Path(home) / f"{number}", file, bit, OPTIONS, finished=finished)
            kind = "/".join([file.parts[0].split("-")[0], file.name] if len(file.parts) > 1 else [file.name])
            counts[kind, "finished" if finished else "unfinished", outcome] += 1
            if outcome in ("silent", "traceback"):
                print(f"{outcome}: {file} bit {bit} finished={finished}: {said[-300:]}")
    for (kind, state, outcome), count in sorted(counts.items()):
        print(f"{count:4}  {kind:34} {state:10} {outcome}")
    print({outcome: sum(n for key, n in counts.items() if key[2] == outcome) for outcome in {k[2] for k in counts}})


if __name__ == "__main__":
    main()

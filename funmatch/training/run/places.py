"""Names the folders of checkpoints, and finds out from them how far a run has come."""

from pathlib import Path

STEP, BEST, STABLE = "step", "best", "stable"


def name_of(kind: str, step: int) -> str:
    """Returns the name of a checkpoint's folder."""
    # Padded with zeros, so that names sort by step; published runs have such names.
    return f"{kind}-{step:09}"


def list_places(folder: Path, kind: str) -> list[Path]:
    """Returns the folders of one kind, the earliest step first."""
    return sorted(folder.glob(f"{kind}-*"))


def step_of(path: Path) -> int:
    """Returns the step of a checkpoint's folder; -1 if its name has none."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def saved_step(folder: Path) -> int:
    """Returns the step of the newest checkpoint in a folder; 0 if there is none."""
    return max((step_of(path) for kind in (STEP, STABLE) for path in list_places(folder, kind)), default=0)

"""The teacher tape: what teachers said of each view of each step, kept for every further student.

The views of a step are a function of seed and step alone (`draws`), so what a frozen teacher says of them is one, too.
A tape keeps it row by row: record `step · batch + row` of `answers.bin` holds a view's logits in half precision, and a
checksum that knows its place. Whatever is not there whole is as if it were not there at all, so a tape can be cut off
at any byte, written by several processes, and made longer by a longer run. `tape.json` says whose answers they are.

Of very many classes a tape may keep the first k by the teacher, and the rest as one mass (`top`).
"""

import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funmatch.errors import InputError
from funmatch.runtime.files import disk_errors, write_atomically
from funmatch.runtime.text import format_bytes

FORMAT = 1
HEADER, ANSWERS = "tape.json", "answers.bin"
FEW = 1 << 16
"""Rows that are looked through at a time, when a whole tape is."""


@dataclass(frozen=True)
class Layout:
    """What a row of a tape holds.

    Attributes:
        batch: views of a step.
        classes: that teachers answer.
        top: classes that are kept of them, the rest as one mass; None keeps all.
        temperature: at which the rest is one mass; without `top` it does not matter.
    """

    batch: int
    classes: int
    top: int | None = None
    temperature: float = 1.0

    @property
    def row(self) -> np.dtype:
        """Logits in half precision, the classes that they are of where not all are kept, a checksum."""
        picks = [] if self.top is None else [("picks", "<u2" if self.classes <= 1 << 16 else "<u4", (self.top,))]
        return np.dtype([("logits", "<f2", (self.kept,)), *picks, ("check", "<u4")])

    @property
    def kept(self) -> int:
        """Numbers of a row."""
        return self.classes if self.top is None else self.top + 1

    def bytes_of(self, steps: int) -> int:
        """Of a tape of so many steps."""
        return steps * self.batch * self.row.itemsize

    def packed(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (n, classes) as they are kept: (n, kept) in fp16, and of which classes, (n, top), if not all."""
        logits, picks = logits.detach().float(), None
        if self.top is not None:
            first, picks = logits.topk(self.top)
            rest = logits.scatter(1, picks, -torch.inf)
            mass = (rest / self.temperature).logsumexp(1, keepdim=True) * self.temperature
            logits = torch.cat([first, mass], 1)
        return logits.half(), picks

    def unpacked(self, half: Tensor, picks: Tensor | None) -> Tensor:
        """Logits (n, classes) float32 from what is kept of them; the mass of the rest is shared out evenly."""
        logits = half.float()
        if self.top is None or picks is None:
            return logits
        each = logits[:, -1:] - self.temperature * math.log(self.classes - self.top)
        return each.expand(-1, self.classes).scatter(1, picks, logits[:, :-1])


def fold_dropped_classes(student: Tensor, told: Tensor, top: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Both logits, (n, classes), among the teacher's first `top` classes and the rest as one: (n, top + 1).

    At the temperature the last has the probability of all the rest, so that a distance between probabilities is that
    between what is known of them. KL is so at most the whole KL: it lacks how the student shares out the rest, which
    weighs as much as the teacher gives to the rest.
    """
    picks = told.topk(top).indices

    def among(logits: Tensor) -> Tensor:
        rest = logits.scatter(1, picks, -torch.inf)
        mass = (rest / temperature).logsumexp(1, keepdim=True) * temperature
        return torch.cat([logits.gather(1, picks), mass], 1)

    return among(student), among(told)


def dropped_mass(logits: Tensor, top: int, temperature: float) -> float:
    """The mean probability that logits, (n, classes), give to all but their first `top` classes."""
    return 1 - (logits.float() / temperature).softmax(-1).topk(top).values.sum(-1).mean().item()


@dataclass
class Tape:
    """An open tape.

    Attributes:
        folder: holding `tape.json` and `answers.bin`.
        layout: of its rows.
        header: what `tape.json` holds.
        recording: whether what is new is written.
    """

    folder: Path
    layout: Layout
    header: dict[str, Any]
    recording: bool = False
    _file: int | None = field(default=None, repr=False)
    _opening: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def path(self) -> Path:
        return self.folder / ANSWERS

    @property
    def whose(self) -> int:
        """What ties the rows to the header; nothing does on tapes that are older than its checksum."""
        return self.header.get("check", 0)

    @property
    def size(self) -> int:
        """Bytes of the rows, up to the last."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def read(self, step: int, first: int, count: int) -> Tensor | None:
        """What was said of some rows of a step, (count, classes) float32; None unless all of them are there, sound.

        Args:
            first: the first row, in the batch of all processes.
        """
        start = step * self.layout.batch + first
        rows = self._rows(start, count)
        if len(rows) < count or not self._sound(rows, start).all():
            return None
        picks = None if self.layout.top is None else torch.from_numpy(rows["picks"].astype(np.int64))
        return self.layout.unpacked(torch.from_numpy(rows["logits"].copy()), picks)

    def write(self, step: int, first: int, half: Tensor, picks: Tensor | None) -> None:
        """Writes what is said of some rows of a step, as the layout packs it.

        Raises:
            InputError: a logit is too large for half precision.
            OSError: the disk is full, or fails; all that was written before stays.
        """
        if not half.isfinite().all():
            raise InputError("a teacher's logits go beyond ±65,504, which a tape cannot hold; leave --tape out")
        rows = np.zeros(len(half), self.layout.row)
        rows["logits"] = half.numpy()
        if picks is not None:
            rows["picks"] = picks.numpy()
        start = step * self.layout.batch + first
        rows["check"] = _checks(rows, start, self.whose)
        content, place = rows.tobytes(), start * self.layout.row.itemsize
        with disk_errors(self.path):
            while content:
                written = os.pwrite(self._handle(), content, place)
                content, place = content[written:], place + written

    def counts(self) -> tuple[int, int, list[range]]:
        """Rows that are there, rows that are damaged, and the steps that are there whole, as ranges."""
        batch, there, damaged = self.layout.batch, 0, 0
        whole: list[range] = []
        for start, rows in self.all_rows():
            sound = self._sound(rows, start)
            written = np.frombuffer(rows.tobytes(), np.uint8).reshape(len(rows), -1).any(1)
            there, damaged = there + int(sound.sum()), damaged + int((written & ~sound).sum())
            steps = sound[: len(sound) // batch * batch].reshape(-1, batch).all(1)
            for step in (start // batch + np.flatnonzero(steps)).tolist():
                if whole and whole[-1].stop == step:
                    whole[-1] = range(whole[-1].start, step + 1)
                else:
                    whole.append(range(step, step + 1))
        return there, damaged, whole

    def all_rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of whole steps at a time, and the place of the first."""
        some = max(1, FEW // self.layout.batch) * self.layout.batch
        total = self.size // self.layout.row.itemsize
        for start in range(0, total, some):
            yield start, self._rows(start, min(some, total - start))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _handle(self) -> int:
        with self._opening:  # several threads make batches
            if self._file is None:
                flags = os.O_RDWR | os.O_CREAT if self.recording else os.O_RDONLY
                self._file = os.open(self.path, flags, 0o644)
            return self._file

    def _rows(self, start: int, count: int) -> np.ndarray:
        """Rows as they lie there; fewer where the file ends. What is left of a row that is cut off is not one."""
        size = self.layout.row.itemsize
        if not self.recording and not self.path.is_file():
            return np.empty(0, self.layout.row)
        content = os.pread(self._handle(), count * size, start * size)
        return np.frombuffer(content, self.layout.row, len(content) // size)

    def _sound(self, rows: np.ndarray, start: int) -> np.ndarray:
        return rows["check"] == _checks(rows, start, self.whose)


def _check_of(header: Mapping[str, Any]) -> int:
    """A checksum of what a header says of the rows."""
    return zlib.crc32(json.dumps([header["layout"], header["asked"]], sort_keys=True).encode())


def _checks(rows: np.ndarray, start: int, whose: int) -> np.ndarray:
    """A checksum of each row that knows its tape and its place: what was written elsewhere does not pass for it."""
    size = rows.dtype.itemsize
    content = memoryview(rows.tobytes())
    found = (
        zlib.crc32(content[at * size : (at + 1) * size - 4], zlib.crc32((start + at).to_bytes(8, "little"), whose))
        for at in range(len(rows))
    )
    return np.fromiter(found, np.uint32, len(rows))


def open_tape(folder: Path, layout: Layout, asked: Mapping[str, Any], about: Mapping[str, Any]) -> Tape:
    """The tape in a folder, or a new one there.

    Args:
        asked: what its answers depend on: images, draws, views, teachers.
        about: what else is kept of its beginning.

    Raises:
        InputError: the folder holds something else, or a tape of other answers.
    """
    folder = folder.expanduser()
    path = folder / HEADER
    if path.is_file():
        tape = find_tape(folder)
        then = tape.header["asked"]
        now = json.loads(json.dumps(asked))
        differing = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
        if differing:
            lines = "\n  ".join(f"{name}: {then.get(name)} on the tape, {now.get(name)} now" for name in differing)
            raise InputError(f"{folder} is a tape of other answers:\n  {lines}\nchoose another --tape, or leave it out")
        return tape
    if folder.is_file() or (folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir())):
        raise InputError(f"{folder} exists and is no tape; choose another --tape")
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: getattr(layout, name) for name in ("batch", "classes", "top", "temperature")}
    header = json.loads(json.dumps({"format": FORMAT, "layout": kept, "asked": dict(asked), **about}, default=str))
    write_atomically(path, json.dumps(header | {"check": _check_of(header)}, indent=1))
    return find_tape(folder)


def find_tape(folder: Path) -> Tape:
    """The tape in a folder.

    Raises:
        InputError: there is none, its header is damaged, or of a later version.
    """
    path = folder.expanduser() / HEADER
    if not path.is_file():
        raise InputError(f"{folder} is no tape: it has no {HEADER}")
    try:
        header = json.loads(path.read_text())
        layout = Layout(**header["layout"])
        if header["format"] == FORMAT and isinstance(header["asked"], dict):
            if header.get("check") not in (None, _check_of(header)):
                raise ValueError("changed since it was written")
            return Tape(path.parent, layout, header)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; remove {folder}, and the next run records it again") from None
    raise InputError(f"{path} is of format {header['format']}, this version reads {FORMAT}")


def check_space(tape: Tape, steps: int) -> None:
    """Raises `InputError` unless the disk has room for all that will be recorded."""
    have = tape.path.stat().st_blocks * 512 if tape.path.is_file() else 0
    wanted = tape.layout.bytes_of(steps) - have
    free = shutil.disk_usage(tape.folder).free
    if wanted > free:
        raise InputError(
            f"the tape of {steps:,} steps takes {format_bytes(wanted)} more in {tape.folder}, where "
            f"{format_bytes(free)} are free; choose another --tape, keep fewer classes (--tape-top), or leave it out"
        )

"""Stores a frozen teacher's logits for each view of each step in a tape, for every further student.

The views of a step are a function of seed and step alone (`ops.sampling`), and so are a frozen teacher's logits for
them. A tape keeps these row by row: record `step · batch + row` of `answers.bin` holds a view's logits in half
precision, and a checksum that knows its place. A row that is not whole counts as missing, so a tape can be cut off at
any byte, written by several processes, and made longer by a longer run. `tape.json` says what the logits depend on.

Of very many classes a tape may keep the teacher's first k, and the rest as one mass (`top`).
"""

import json
import math
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funmatch.errors import InputError
from funmatch.ops.view_spec import list_key_differences
from funmatch.runtime.disk.files import disk_errors
from funmatch.runtime.disk.json_files import Damaged
from funmatch.runtime.disk.records import RecordFolder
from funmatch.training.run.metrics_log import RECORDED_TEACHER

FORMAT = 1
HEADER, ANSWERS = "tape.json", "answers.bin"
HEADER_SHAPE = {
    "layout": {"batch": int, "classes": int, "top": int | None, "temperature": float},
    "asked": {"seed": int, "batch": int, "side": int, "crop": str},
    "device": str, "forms": [RECORDED_TEACHER], "run": {"teacher": list[str], "data": list[str]}, "check?": int,
}  # fmt: skip
"""`asked` is the key of what the logits depend on; `check` is missing on tapes that are older than it."""
ROWS_AT_ONCE = 1 << 16
"""Rows that are read at a time when a whole tape is read."""


@dataclass(frozen=True)
class Layout:
    """The format of a tape's rows.

    Attributes:
        batch: views per step.
        classes: outputs of the teacher; where features are matched, the numbers of its answers.
        top: classes kept of them, the rest as one mass; None keeps all.
        temperature: temperature at which the rest is one mass; without `top` it does not matter.
    """

    batch: int
    classes: int
    top: int | None = None
    temperature: float = 1.0

    @property
    def row(self) -> np.dtype:
        """Type of a row: logits in half precision, their classes if not all are kept, and a checksum."""
        picks = [] if self.top is None else [("picks", "<u2" if self.classes <= 1 << 16 else "<u4", (self.top,))]
        return np.dtype([("logits", "<f2", (self.kept,)), *picks, ("check", "<u4")])

    @property
    def kept(self) -> int:
        """Numbers per row."""
        return self.classes if self.top is None else self.top + 1

    @property
    def is_possible(self) -> bool:
        """Whether such rows can be read; a damaged header may hold any numbers."""
        return self.batch > 0 and 0 < (self.top or 1) <= self.classes and self.temperature > 0

    def bytes_of(self, steps: int) -> int:
        """Returns the size of a tape of this many steps, bytes."""
        return steps * self.batch * self.row.itemsize

    def packed(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns logits (n, classes) as rows store them: (n, kept) in fp16; with `top` also the classes, (n, top)."""
        logits, picks = logits.detach().float(), None
        if self.top is not None:
            first, picks = logits.topk(self.top)
            rest = logits.scatter(1, picks, -torch.inf)
            mass = (rest / self.temperature).logsumexp(1, keepdim=True) * self.temperature
            logits = torch.cat([first, mass], 1)
        return logits.half(), picks

    def unpacked(self, half: Tensor, picks: Tensor | None) -> Tensor:
        """Returns logits (n, classes) float32 of what rows store; the mass of the rest is spread evenly."""
        logits = half.float()
        if self.top is None or picks is None:
            return logits
        # In the log domain: the rest's mass divided by its number of classes.
        each = logits[:, -1:] - self.temperature * math.log(self.classes - self.top)
        return each.expand(-1, self.classes).scatter(1, picks, logits[:, :-1])


def fold_dropped_classes(student: Tensor, teacher: Tensor, top: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Folds both logits, (n, classes), into the teacher's first `top` classes and the rest as one: (n, top + 1).

    At the temperature the last has the probability of all the rest, so that a distance compares only what the tape
    holds. KL is then at most the whole KL: it lacks how the student spreads the rest, weighted by the teacher's mass.
    """
    picks = teacher.topk(top).indices

    def among(logits: Tensor) -> Tensor:
        rest = logits.scatter(1, picks, -torch.inf)
        mass = (rest / temperature).logsumexp(1, keepdim=True) * temperature
        return torch.cat([logits.gather(1, picks), mass], 1)

    return among(student), among(teacher)


def dropped_mass(logits: Tensor, top: int, temperature: float) -> float:
    """Returns the mean probability that logits, (n, classes), give to all but their first `top` classes."""
    return 1 - (logits.float() / temperature).softmax(-1).topk(top).values.sum(-1).mean().item()


@dataclass
class Tape:
    """An open tape.

    Attributes:
        folder: the folder with `tape.json` and `answers.bin`.
        layout: the format of its rows.
        header: contents of `tape.json`.
        recording: whether new rows are written.
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
    def header_check(self) -> int:
        """The checksum that ties the rows to the header; 0 on tapes that are older than it."""
        return self.header.get("check", 0)

    @property
    def size(self) -> int:
        """Bytes up to the last row."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def read(self, step: int, first: int, count: int) -> Tensor | None:
        """Returns logits of some rows of a step, (count, classes) float32; None unless all are there and undamaged.

        Args:
            first: place of the first row in the global batch.
        """
        start = step * self.layout.batch + first
        rows = self._rows(start, count)
        if len(rows) < count or not self._undamaged(rows, start).all():
            return None
        picks = None if self.layout.top is None else torch.from_numpy(rows["picks"].astype(np.int64))
        return self.layout.unpacked(torch.from_numpy(rows["logits"].copy()), picks)  # not read-only

    def write(self, step: int, first: int, half: Tensor, picks: Tensor | None) -> None:
        """Writes the logits of some rows of a step, as the layout packs them.

        Raises:
            InputError: a logit is too large for half precision.
            OSError: the disk is full, or fails; all that was written before stays.
        """
        if not half.isfinite().all():
            raise InputError("a teacher's answers exceed ±65,504, more than a tape can hold; leave --tape out")
        rows = np.zeros(len(half), self.layout.row)
        rows["logits"] = half.numpy()
        if picks is not None:
            rows["picks"] = picks.numpy()
        start = step * self.layout.batch + first
        rows["check"] = _checks(rows, start, self.header_check)
        content, place = rows.tobytes(), start * self.layout.row.itemsize
        # One write at a place, not an append: processes write rows of one file in any order, and a row that a kill cut
        # short fails its checksum and is written again.
        with disk_errors(self.path):
            while content:
                written = os.pwrite(self._handle(), content, place)
                content, place = content[written:], place + written

    def counts(self) -> tuple[int, int, list[range]]:
        """Returns the numbers of undamaged and of damaged rows, and the ranges of complete steps."""
        batch, found, damaged = self.layout.batch, 0, 0
        whole: list[range] = []
        for start, rows in self.all_rows():
            undamaged = self._undamaged(rows, start)
            written = np.frombuffer(rows.tobytes(), np.uint8).reshape(len(rows), -1).any(1)  # holes are 0
            found, damaged = found + int(undamaged.sum()), damaged + int((written & ~undamaged).sum())
            steps = undamaged[: len(undamaged) // batch * batch].reshape(-1, batch).all(1)
            for step in (start // batch + np.flatnonzero(steps)).tolist():
                if whole and whole[-1].stop == step:
                    whole[-1] = range(whole[-1].start, step + 1)
                else:
                    whole.append(range(step, step + 1))
        return found, damaged, whole

    def all_rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields all rows, several steps at a time, each with the place of the first."""
        some = max(1, ROWS_AT_ONCE // self.layout.batch) * self.layout.batch  # whole steps, for `counts`
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
                flags = os.O_RDWR | os.O_CREAT if self.recording else os.O_RDONLY  # a shared disk may be read-only
                self._file = os.open(self.path, flags, 0o644)
            return self._file

    def _rows(self, start: int, count: int) -> np.ndarray:
        """Returns rows as they are on the disk, fewer at the end of the file, and no row that was cut off."""
        size = self.layout.row.itemsize
        if not self.recording and not self.path.is_file():
            return np.empty(0, self.layout.row)
        content = os.pread(self._handle(), count * size, start * size)
        return np.frombuffer(content, self.layout.row, len(content) // size)

    def _undamaged(self, rows: np.ndarray, start: int) -> np.ndarray:
        return rows["check"] == _checks(rows, start, self.header_check)


def _check_of(header: Mapping[str, Any]) -> int:
    """Returns the checksum of the parts of a header that its rows depend on."""
    # All rows of a tape include it, so its spelling must stay as it is.
    return zlib.crc32(json.dumps([header["layout"], header["asked"]], sort_keys=True).encode())


def _checks(rows: np.ndarray, start: int, header_check: int) -> np.ndarray:
    """Returns checksums of rows with their tape and place, so that rows of another tape or place fail them."""
    size = rows.dtype.itemsize
    content = memoryview(rows.tobytes())
    found = (
        zlib.crc32(  # of all but the checksum itself, at the end
            content[at * size : (at + 1) * size - 4], zlib.crc32((start + at).to_bytes(8, "little"), header_check)
        )
        for at in range(len(rows))
    )
    return np.fromiter(found, np.uint32, len(rows))


def record_folder(folder: Path) -> RecordFolder:
    """Returns the folder of a tape, whether it has begun or not."""
    return RecordFolder(
        folder.expanduser(), HEADER, "tape", HEADER_SHAPE, number=FORMAT, option="--tape", lock_name=".lock"
    )


def open_tape(folder: Path, layout: Layout, key: Mapping[str, Any], about: Mapping[str, Any]) -> Tape:
    """Opens the tape in a folder, or begins one there.

    Args:
        key: what its logits depend on: images, draws, views, teachers.
        about: what else its header records.

    Raises:
        InputError: the folder holds something else, or a tape with another key.
    """
    (place := record_folder(folder)).check_place()
    place.folder.mkdir(parents=True, exist_ok=True)
    spec = {name: getattr(layout, name) for name in ("batch", "classes", "top", "temperature")}
    header = json.loads(json.dumps({"layout": spec, "asked": dict(key), **about}, default=str))  # as read back
    place.begin(
        header | {"check": _check_of(header)},
        lambda then, now: list_key_differences(then["asked"], now["asked"], "on the tape"),
    )
    return find_tape(folder)


def find_tape(folder: Path) -> Tape:
    """Opens the tape in a folder.

    Raises:
        InputError: there is none, its header is damaged, or of a newer format.
    """
    place = record_folder(folder)
    if not place.has_begun:
        raise InputError(f"{folder} is not a tape: it has no {HEADER}")
    advice = f"remove {place.folder}, and the next run records it again"
    try:
        header = place.read()
    except Damaged as error:
        raise Damaged(f"{error}; or {advice}") from None
    layout = Layout(**{field.name: header["layout"][field.name] for field in fields(Layout)})
    if not layout.is_possible or header.get("check") not in (None, _check_of(header)):
        raise Damaged(f"{place.path} is damaged (changed since it was written); {advice}")
    return Tape(place.folder, layout, header)

"""Defines the kinds of plots in study files, and checks their entries."""

from collections.abc import Iterable, Mapping
from typing import Any

from funmatch.config import TAUGHT
from funmatch.errors import unknown
from funmatch.ops import metrics
from funmatch.ops.tasks import multilabel

KINDS: Mapping[str, tuple[str, ...]] = {
    "curves": ("value", "event"),
    "ends": ("value",),
    "against": ("value", "knob"),
    "scatter": ("value", "across"),
}
"""Kinds of plots, and the keys that each requires."""
MEASURED = (*metrics.METRICS, *multilabel.METRICS, "knn", "cosine")
"""Metrics of evaluations; the last two where features are matched."""
CURVES: Mapping[str, tuple[str, ...]] = {
    "step": ("loss", "lr", "images_per_second", "features", "tokens"),
    "eval": MEASURED,
    "ema": MEASURED,
    "views": (*MEASURED, "teacher_top1", "teacher_map"),
}
"""Metrics that a run records during training, by event."""
ENDS = (
    *MEASURED, *(f"{each}_{name}" for each in ("views", "ema") for name in MEASURED), "loss", "seconds",
    "step", "best_step", "best_score", "parameters", "pictures", "teacher_top1", "views_teacher_top1",
    "teacher_map", "views_teacher_map",
)  # fmt: skip
"""Final metrics of a run."""


def problems(figure: dict[str, Any]) -> list[str]:
    """Lists the problems of a plot in a study file, one sentence each."""
    kind = figure.get("kind")
    # Alone: without a kind no other key can be checked.
    if not isinstance(kind, str) or kind not in KINDS:
        return [str(unknown("kind", str(kind), KINDS))]
    allowed = {"kind", "title", "log", *KINDS[kind]}
    found = [f"{kind} needs {key}" for key in KINDS[kind] if not isinstance(figure.get(key), str)]
    found += [str(unknown("key", key, allowed)) for key in figure if key not in allowed]
    # Values are looked up by keys that must all be there.
    if found:
        return found
    known: Mapping[str, Iterable[str]] = {
        # A curve's values depend on its event; those of the other kinds are final metrics.
        "value": CURVES.get(figure.get("event", ""), ENDS),
        "across": ENDS,
        "event": CURVES,
        "knob": {name for table in TAUGHT.values() for name in table.model_fields},
    }
    return [str(unknown(key, figure[key], known[key])) for key in KINDS[kind] if figure[key] not in known[key]]

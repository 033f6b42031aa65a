"""Ranks candidate teachers before a run, for `plan --teachers`."""

from typing import Any

from funmatch.commands.common.ready import build, prepared
from funmatch.config.search import PlanDistill
from funmatch.errors import InputError
from funmatch.ops.tasks.task import task_of_metrics
from funmatch.runtime import env
from funmatch.runtime.log import info, print_line, print_table
from funmatch.runtime.text import MISSING, percent
from funmatch.training.teachers import ranking


def rank(config: PlanDistill) -> dict[str, Any]:
    """Compares the candidate teachers of a run; see `ranking.compare`.

    Returns:
        `teachers`, the best first; `data`, `split` on which their accuracy was measured, `views`, `strategy`.
    """
    if env.world_size() > 1:
        raise InputError("plan runs in a single process; start it without torchrun")
    # A weak candidate is shown as what it is; and a tape holds the answers of one teacher.
    config = config.model_copy(update={"allow_weak_teacher": True, "tape": None, "tape_full": "stop"})
    with prepared(*build(config)) as (setup, objective):
        assert objective.teachers
        assert objective.teacher_logits
        views = config.teachers_views
        info(f"showing {views:,} views of the run to {len(objective.teachers.members)} teachers")
        return {
            "teachers": ranking.compare(setup, objective.teachers, objective.teacher_logits, views),
            "data": setup.cache.name,
            "split": setup.evaluation.validation.name,
            "views": views,
            "strategy": config.strategy,
        }


def show(ranked: dict[str, Any]) -> None:
    """Prints the candidates, the best first, and what the order means."""
    task = task_of_metrics(ranked["teachers"][0])
    labelled = ranked["teachers"][0][task.score] is not None
    rows = [
        [
            row["teacher"],
            percent(row[task.score]) if labelled else "no labels",
            f"{row['entropy']:.3f}",
            f"{row['spread']:.5f}",
            MISSING if row["gflop"] is None else f"{row['gflop']:.3g}",
            f"{row['ms']:,.2f}",
        ]
        for row in ranked["teachers"]
    ]
    headings = ["teacher", task.shown, "entropy", "spread", "GFLOP", "ms"]
    print_table(f"teachers, shown {ranked['views']:,} views of {ranked['strategy']}", headings, rows)
    order = "accuracy" if labelled else "spread, as there are no labels: a teacher that knows nothing has the smallest"
    print_line(f"{task.shown} on {ranked['split']}; entropy in nats; spread of the mean answer; GFLOP and ms an image")
    print_line(f"ordered by {order}; how much these figures predict: docs/distillation.md")

"""A run under way: the loop's own `for`, and what is recorded, judged and saved beside it."""

import copy
import math
import platform
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import timm
import torch
from torch import Tensor

import funmatch
from funmatch import checkpoint, devices, runs, signals
from funmatch.data.loader import Batch, Loader, prefetch
from funmatch.errors import InputError
from funmatch.files import folder_atomically
from funmatch.fit import fit
from funmatch.logs import Bar, percent, say
from funmatch.models import classifier as models
from funmatch.optim import adam
from funmatch.tasks import evaluate
from funmatch.tasks.lesson import Lesson

LossOf = Callable[[Batch], Tensor]


@dataclass
class Standing:
    """Where a run stands besides its tensors: what `state.json` of a checkpoint holds."""

    step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_score: float = -1.0
    window: list[float] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)


def carry_out(
    lesson: Lesson,
    loss_of: LossOf,
    teacher_logits: Tensor | None = None,
    ahead: Callable[[Batch], Batch] | None = None,
) -> dict[str, Any]:
    """Walks a run from where it stands to its end.

    Args:
        lesson: what is taught to whom.
        loss_of: a batch to its mean loss.
        ahead: what is done to a batch beforehand, in the threads that make views.
        teacher_logits: the teacher's answers on the watched split, (n, classes), where there is a teacher.

    Returns:
        the figures that `result.json` holds.

    Raises:
        InputError: the folder holds something else, or the loss is no longer finite.
        Stopped: by Ctrl-C or SIGTERM, after saving.
    """
    facts = {
        "data": lesson.cache.key,
        "teacher": models.fingerprint(lesson.teacher.classifier.net) if lesson.teacher else None,
        "pictures": {name: len(split) for name, split in lesson.cache.splits.items()},
        "classes": list(lesson.cache.classes),
        "parameters": lesson.student.count(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {lesson.course.device}",
        "versions": {"funmatch": funmatch.__version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    knobs = lesson.config.model_dump(mode="json")
    with runs.opened(lesson.config.out, lesson.verb, knobs, facts) as run:
        if run.result:
            say(f"{run.folder} is finished at step {run.result['step']}; nothing to do")
            return run.result
        walk = Walk(lesson, run, teacher_logits)
        walk.go(loss_of, ahead)
        return walk.finish()


class Walk:
    """A run under way: the loop's own `for`, and what is recorded, judged and saved beside it."""

    def __init__(self, lesson: Lesson, run: runs.Run, teacher_logits: Tensor | None) -> None:
        self.lesson, self.run, self.teacher_logits = lesson, run, teacher_logits
        self.watched = evaluate.watched(lesson.cache)
        self.optimizer = adam(lesson.student.net, lesson.config.lr, lesson.config.weight_decay)
        self.scaler = devices.loss_scaler(lesson.course.device, lesson.course.precision)
        self.standing = Standing()
        self.losses: list[Tensor] = []
        self.clock, self.away = time.monotonic(), 0.0
        self.notes: dict[str, str] = {}
        if state := checkpoint.restore(run.checkpoints, lesson.student.net, self.optimizer):
            self.standing = Standing(**state)
            self.scaler.load_state_dict(self.standing.scaler)
            self.losses = [torch.tensor(loss, device=lesson.course.device) for loss in self.standing.window]
            say(f"{run.folder}: going on from step {self.standing.step} of {lesson.course.steps}")
        run.metrics.cut(self.standing.step or -1)
        if lesson.teacher and teacher_logits is not None and not self.standing.step:
            figures = runs.finite(evaluate.judge(teacher_logits, self.watched))
            name = lesson.teacher.classifier.card.name
            run.metrics.write("teacher", 0, teacher=name, split=self.watched.name, **figures)

    def go(self, loss_of: LossOf, ahead: Callable[[Batch], Batch] | None) -> None:
        """Takes all steps that are left."""
        config, course, student = self.lesson.config, self.lesson.course, self.lesson.student
        split = self.lesson.cache.splits["train"]
        loader = Loader(split, config.seed, config.batch, self.lesson.view.side, config.crop_min_area)
        start = self.standing.step
        workers = config.workers or devices.spare_threads()
        batches = prefetch(loader, start, course.steps, workers=workers, finish=ahead or devices.pinner(course.device))
        with closing(batches), Bar(self.lesson.verb, course.steps, start) as bar, signals.heard() as caught:
            self.clock = time.monotonic()
            for step, loss in fit(course, student, self.optimizer, self.scaler, batches, loss_of, start):
                self.standing.step = step
                self.losses.append(loss)
                last = step == course.steps
                if last or step % config.log_every == 0:
                    self.log()
                judged, saved = last or step % config.eval_every == 0, last or step % config.save_every == 0 or caught
                if judged or saved:
                    self.check_weights()
                if judged:
                    self.watch()
                if saved:
                    self.save()
                bar.update(step, " ".join(self.notes.values()))
                if caught and not last:
                    told = f"saved step {step} of {course.steps} in {self.run.folder}"
                    raise signals.Stopped(caught[0], f"{told}; the same command goes on from there")

    def log(self) -> None:
        """Records the mean loss since the last time."""
        step, course = self.standing.step, self.lesson.course
        losses = self.fetched()
        loss = math.fsum(losses) / len(losses)
        now = time.monotonic()
        made = (len(losses) - len(self.standing.window)) * self.lesson.config.batch
        rate = made / (now - self.clock - self.away)
        self.standing.seconds += now - self.clock
        self.standing.window = []
        self.run.metrics.write("step", step, loss=loss, lr=course.lr_at(step - 1), images_per_second=rate)
        self.notes["loss"] = f"loss {loss:.4f}, {rate:,.0f} images/s"
        self.losses, self.clock, self.away = [], now, 0.0

    def fetched(self) -> list[float]:
        """The losses since the last record: the only place that waits for the device."""
        losses: list[float] = torch.stack(self.losses).tolist() if self.losses else []
        if not all(map(math.isfinite, losses)):
            self.give_up("the loss is")
        return losses

    def check_weights(self) -> None:
        """Raises `InputError` if an update has ruined the student."""
        if not all(tensor.isfinite().all() for tensor in self.lesson.student.parameters()):
            self.give_up("the student's weights are")

    def give_up(self, what: str) -> None:
        """Stops a run that cannot recover, before anything of it is saved."""
        raise InputError(
            f"{what} no longer finite at step {self.standing.step}; what {self.run.checkpoints} holds is from before. "
            "Try a lower --lr, a longer --warmup-steps, or --precision fp32, with another --out"
        )

    def watch(self) -> None:
        """Judges the student on the watched split, and keeps it if it is the best so far."""
        standing, began = self.standing, time.monotonic()
        logits = evaluate.answers(self.lesson.student, self.watched, self.lesson.view)
        figures = evaluate.judge(logits, self.watched, self.teacher_logits)
        self.run.metrics.write("eval", standing.step, split=self.watched.name, **runs.finite(figures))
        name = "agreement" if figures["top1"] is None else "top1"
        score = figures[name]
        self.notes["eval"] = f"{name} {percent(score)}"
        # Test pictures are never chosen on, so without a validation split there is no best.
        if score is not None and score > standing.best_score and self.watched.name != "test":
            standing.best_step, standing.best_score = standing.step, score
            checkpoint.save_best(self.run.checkpoints, standing.step, self.lesson.student.net, runs.finite(figures))
        self.away += time.monotonic() - began

    def save(self) -> None:
        """Writes a checkpoint."""
        began = time.monotonic()
        self.standing.scaler = self.scaler.state_dict()
        # Losses that no record holds yet go along, so that a resumed run records what one that never stopped does.
        state = asdict(self.standing) | {"window": self.fetched()}
        checkpoint.save(self.run.checkpoints, self.standing.step, self.lesson.student.net, self.optimizer, state)
        self.away += time.monotonic() - began

    def class_names(self) -> tuple[str, ...] | None:
        """The names of what the student answers: the data's, or the teacher's where the data has numbers or none."""
        cache, teacher = self.lesson.cache, self.lesson.teacher
        if teacher and (cache.unnamed or not cache.classes):
            return teacher.classifier.card.classes
        return cache.classes or None

    def finish(self) -> dict[str, Any]:
        """Judges the finished student, writes it for use elsewhere, and records that the run is over."""
        lesson, view = self.lesson, self.lesson.view
        self.standing.seconds += time.monotonic() - self.clock
        split = evaluate.final(lesson.cache)
        teacher = lesson.teacher
        teacher_logits = self.teacher_logits
        if teacher and split.name != self.watched.name:
            teacher_logits = evaluate.answers(teacher, split, view)
        figures = evaluate.judge(evaluate.answers(lesson.student, split, view), split, teacher_logits)
        result: dict[str, Any] = figures | {
            "split": split.name,
            "pictures": len(split),
            "step": self.standing.step,
            "seconds": round(self.standing.seconds, 1),
            "parameters": lesson.student.count(),
            "run": str(self.run.folder),
        }
        if teacher and teacher_logits is not None:
            own = evaluate.judge(teacher_logits, split)
            result["teacher"] = {
                "name": teacher.classifier.card.name,
                "parameters": teacher.classifier.count(),
                "top1": own["top1"],
            }
        card = replace(
            lesson.student.card,
            side=view.side,
            crop_fraction=view.side / view.short_side,
            classes=self.class_names(),
        )
        with folder_atomically(self.run.student) as folder:
            portable = copy.deepcopy(lesson.student).cpu()
            models.save(portable, folder, card=card, about={"verb": lesson.verb, "top1": figures["top1"]})
        self.run.finish(result)
        return runs.finite(result)

"""A run under way: the loop's own `for`, and what is recorded, judged and saved beside it."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from funmatch import checkpoint, devices, ends, launch, memory, runs, signals
from funmatch.data.loader import Batch, prefetch
from funmatch.errors import InputError
from funmatch.fit import fit
from funmatch.logs import Bar, percent, say
from funmatch.optim import Average
from funmatch.spans import span
from funmatch.tasks import judging, teachers
from funmatch.tasks.delivery import written
from funmatch.tasks.fastest import compile_student
from funmatch.tasks.lesson import Lesson, optimizer_of, prolong, record_of
from funmatch.tasks.profile import watched
from funmatch.tasks.standing import Judged, Standing

LossOf = Callable[[Batch], Tensor]


def carry_out(
    lesson: Lesson,
    loss_of: LossOf,
    taught: Judged | None = None,
    ahead: Callable[[Batch], Batch] | None = None,
    both: Callable[[Batch], tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Any]:
    """Walks a run from where it stands to its end.

    Args:
        lesson: what is taught to whom.
        loss_of: a batch to its mean loss.
        ahead: what is done to a batch beforehand, in the threads that make views.
        taught: the teachers' answers on the watched split, where there are teachers; of the first process.
        both: a batch to what student and teachers say of it, where there are teachers.

    Returns:
        the figures that `result.json` holds.

    Raises:
        InputError: the folder holds something else, or the loss is no longer finite.
        Stopped: by Ctrl-C or SIGTERM, after saving.
    """
    prolong(lesson)
    knobs, facts = record_of(lesson)
    with runs.opened(lesson.config.out, lesson.verb, knobs, facts) as run:
        if result := devices.from_first(lambda: run.result):
            say(f"{run.folder} is finished at step {result['step']}; nothing to do")
            return result
        walk = Walk(lesson, run, taught, both)
        walk.go(loss_of, ahead)
        return devices.from_first(walk.finish)


class Walk:
    """A run under way: the loop's own `for`, and what is recorded, judged and saved beside it."""

    def __init__(
        self,
        lesson: Lesson,
        run: runs.Run,
        taught: Judged | None,
        both: Callable[[Batch], tuple[Tensor, Tensor]] | None,
    ) -> None:
        self.lesson, self.run, self.both = lesson, run, both
        self.teacher_logits = taught.together if taught else None
        self.watched = judging.watched(lesson.cache)
        self.optimizer = optimizer_of(lesson)
        self.scaler = devices.loss_scaler(lesson.course.device, lesson.course.precision)
        self.average = Average(lesson.student, lesson.config.ema) if lesson.config.ema is not None else None
        self.standing = Standing()
        self.losses: list[Tensor] = []
        self.clock, self.away = time.monotonic(), 0.0
        self.notes: dict[str, str] = {}
        state = devices.in_turn(
            lambda: checkpoint.restore(run.checkpoints, lesson.student.net, self.optimizer, self.average_net)
        )
        if state:
            self.standing = Standing(**state)
            self.scaler.load_state_dict(self.standing.scaler)
            self.losses = [torch.tensor(loss, device=lesson.course.device) for loss in self.standing.window]
            say(f"{run.folder}: going on from step {self.standing.step} of {lesson.course.steps}")
        self.stable = ends.stable_step(lesson.config.model_dump())
        if self.standing.step and self.standing.step == self.stable:
            self.keep_stable()
        run.metrics.cut(self.standing.step or -1)
        if taught and not self.standing.step:
            self.record_teachers(taught)

    @property
    def average_net(self) -> nn.Module | None:
        return self.average.model.net if self.average else None

    def record_teachers(self, taught: Judged) -> None:
        """Records how good the teachers are on the watched split: each, and together where there are several."""
        assert self.lesson.teachers
        members = self.lesson.teachers.members
        known = zip(members, taught.each, self.lesson.facts["teacher_forms"], strict=True)
        for member, logits, form in known:
            figures = runs.finite(judging.judge(logits, self.watched))
            self.run.metrics.write("teacher", 0, teacher=member.name, split=self.watched.name, **figures, **form)
        if len(members) > 1:
            figures = runs.finite(judging.judge(taught.together, self.watched))
            self.run.metrics.write("teacher", 0, teacher=self.lesson.teachers.name, split=self.watched.name, **figures)

    def go(self, loss_of: LossOf, ahead: Callable[[Batch], Batch] | None) -> None:
        """Takes all steps that are left."""
        self.compile()
        with Bar(self.lesson.verb, self.lesson.course.steps, self.standing.step) as bar, signals.heard() as caught:
            for step in self.steps(loss_of, ahead, caught):
                bar.update(step, " ".join(self.notes.values()))

    def compile(self) -> None:
        """Compiles the student, if it is to be and has steps to go."""
        config, course = self.lesson.config, self.lesson.course
        if self.standing.step < course.steps:
            compile_student(self.lesson.student, course, config, config.side or 0)

    def steps(self, loss_of: LossOf, ahead: Callable[[Batch], Batch] | None, caught: Sequence[int]) -> Iterator[int]:
        """Takes a step each time it is asked for one, and gives its number.

        Args:
            caught: the signals that came until now; after one the run is saved, and `Stopped` raised.
        """
        config, course, student = self.lesson.config, self.lesson.course, self.lesson.student
        start = self.standing.step
        workers = config.workers or devices.spare_threads()
        batches = prefetch(
            self.lesson.loader, start, course.steps, workers=workers, finish=ahead or devices.pinner(course.device)
        )
        if self.tired:  # it was stopped between its end and its last record
            return
        with (
            memory.told(self.lesson.loader, course, student, self.optimizer, loss_of),
            closing(batches),
            watched(self.lesson, self.run.folder) as seen,
        ):
            self.clock = time.monotonic()
            for step, loss in fit(course, student, self.optimizer, self.scaler, batches, loss_of, start):
                self.standing.step = step
                self.losses.append(loss)
                if self.average:
                    self.average.follow(student, step)
                last = step == course.steps
                if last or step % config.log_every == 0:
                    with span("logging"):
                        self.log()
                stop = devices.greatest(caught[0] if caught else 0)
                judged = last or step % config.eval_every == 0
                saved = last or step % config.save_every == 0 or step == self.stable or stop
                if judged or saved:
                    self.check_weights()
                if judged and launch.is_first():
                    self.watch()
                tired = self.tired if judged else False
                if tired and self.losses:
                    self.log()
                if saved or tired:
                    self.save()
                if step == self.stable:
                    self.keep_stable()
                seen()
                yield step
                if tired:
                    break
                if stop and not last:
                    told = f"saved step {step} of {course.steps} in {self.run.folder}"
                    raise signals.Stopped(stop, f"{told}; the same command goes on from there")

    @property
    def tired(self) -> bool:
        """Whether validation has not liked the student better for as long as patience lasts."""
        patience = self.lesson.config.patience
        return patience is not None and devices.greatest(self.standing.since_best) >= patience

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
        standing, view, began = self.standing, self.lesson.view, time.monotonic()
        logits = judging.answers(self.lesson.student, self.watched, view)
        figures = judging.judge(logits, self.watched, self.teacher_logits)
        self.run.metrics.write("eval", standing.step, split=self.watched.name, **runs.finite(figures))
        if self.average:
            averaged = judging.answers(self.average.model, self.watched, self.lesson.view)
            own = runs.finite(judging.judge(averaged, self.watched, self.teacher_logits))
            self.run.metrics.write("ema", standing.step, split=self.watched.name, **own)
        if self.both:
            on_views = judging.on_views(self.both, self.lesson.student, self.lesson.loader, standing.step, view)
            self.run.metrics.write("views", standing.step, **runs.finite(on_views))
        name = "agreement" if figures["top1"] is None else "top1"
        score = figures[name]
        self.notes["eval"] = f"{name} {percent(score)}"
        # Test pictures are never chosen on, so without a validation split there is no best.
        standing.since_best += 1
        if score is not None and score > standing.best_score and self.watched.name != "test":
            standing.best_step, standing.best_score, standing.since_best = standing.step, score, 0
            checkpoint.save_best(self.run.checkpoints, standing.step, self.lesson.student.net, runs.finite(figures))
        if self.lesson.trial and score is not None:
            self.lesson.trial.told(standing.step, score)
        self.away += time.monotonic() - began

    def save(self) -> None:
        """Writes a checkpoint; no process goes on, or ends, before it lies there."""
        began = time.monotonic()
        self.standing.scaler = self.scaler.state_dict()
        # Losses that no record holds yet go along, so that a resumed run records what one that never stopped does.
        state = asdict(self.standing) | {"window": self.fetched()}
        net, step = self.lesson.student.net, self.standing.step
        if launch.is_first():
            checkpoint.save(self.run.checkpoints, step, net, self.optimizer, state, self.average_net)
        devices.wait()
        self.away += time.monotonic() - began

    def keep_stable(self) -> None:
        """Keeps the checkpoint of this step, from which the run can be prolonged."""
        if launch.is_first():
            checkpoint.keep_stable(self.run.checkpoints, self.standing.step)
        devices.wait()

    def finish(self) -> dict[str, Any]:
        """Judges the finished student, writes it for use elsewhere, and records that the run is over."""
        lesson, view = self.lesson, self.lesson.view
        self.standing.seconds += time.monotonic() - self.clock
        if lesson.config.keep == "best" and self.standing.best_step is not None:
            checkpoint.load_best(self.run.checkpoints, self.standing.best_step, lesson.student.net)
        split = judging.final(lesson.cache)
        teacher_logits = self.teacher_logits
        if lesson.teachers and split.name != self.watched.name:
            teacher_logits, _ = teachers.answers(lesson.teachers, split, view)
        figures = judging.judge(judging.answers(lesson.student, split, view), split, teacher_logits)
        result: dict[str, Any] = figures | {
            "split": split.name,
            "pictures": len(split),
            "step": self.standing.step,
            "best_step": self.standing.best_step,
            "best_score": self.standing.best_score if self.standing.best_step is not None else None,
            "seconds": round(self.standing.seconds, 1),
            "parameters": lesson.student.count(),
            "run": str(self.run.folder),
        }
        if lesson.teachers and teacher_logits is not None:
            own = judging.judge(teacher_logits, split)
            result["teacher"] = {
                "name": lesson.teachers.name,
                "parameters": lesson.teachers.count(),
                "top1": own["top1"],
            }
        if self.average:
            result["ema"] = judging.judge(judging.answers(self.average.model, split, view), split, teacher_logits)
            written(lesson, self.average.model, self.run.folder / "student-ema", result["ema"]["top1"])
        written(lesson, lesson.student, self.run.student, figures["top1"])
        self.run.finish(result)
        return runs.finite(result)

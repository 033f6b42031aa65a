"""A run under way: the loop's own `for`, and what is recorded, judged and saved beside it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.data.batch import Batch
from funmatch.data.loader import prefetch
from funmatch.ops.optim.updates import Average
from funmatch.runtime import devices, distributed, env, signals, transfers
from funmatch.runtime.log import Bar, say
from funmatch.runtime.text import percent
from funmatch.runtime.timing import span
from funmatch.training import oom, scoring
from funmatch.training.acceleration import hasten
from funmatch.training.export import written
from funmatch.training.loop import fit
from funmatch.training.profiling import watched
from funmatch.training.run import checkpoint, extend
from funmatch.training.run import folder as run_folder
from funmatch.training.run.checkpoint_writer import Keeper
from funmatch.training.run.losses import Losses, ruined
from funmatch.training.run.state import Judged, Standing
from funmatch.training.setup import Lesson, optimizer_of, prolong, record_of, workers_of
from funmatch.training.teachers import loading

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
    with run_folder.opened(lesson.config.out, lesson.verb, knobs, facts) as run:
        if result := distributed.from_first(lambda: run.result):
            say(f"{run.folder} is finished at step {result['step']}; nothing to do")
            return result
        walk = Walk(lesson, run, taught, both)
        walk.go(loss_of, ahead)
        return distributed.from_first(walk.finish)


class Walk:
    """A run under way: the loop's own `for`, and what is recorded, judged and saved beside it."""

    def __init__(
        self,
        lesson: Lesson,
        run: run_folder.Run,
        taught: Judged | None,
        both: Callable[[Batch], tuple[Tensor, Tensor]] | None,
    ) -> None:
        self.lesson, self.run, self.both = lesson, run, both
        self.teacher_logits = taught.together if taught else None
        self.watched = scoring.watched(lesson.cache)
        self.optimizer = optimizer_of(lesson)
        self.scaler = devices.loss_scaler(lesson.course.device, lesson.course.precision)
        self.average = Average(lesson.student, lesson.config.ema) if lesson.config.ema is not None else None
        self.standing = Standing()
        self.keeper = Keeper()
        self.clock, self.away = time.monotonic(), 0.0
        self.notes: dict[str, str] = {}
        state = distributed.in_turn(
            lambda: checkpoint.restore(run.checkpoints, lesson.student.net, self.optimizer, self.average_net)
        )
        if state:
            self.standing = Standing(**state)
            self.scaler.load_state_dict(self.standing.scaler)
            say(f"{run.folder}: going on from step {self.standing.step} of {lesson.course.steps}")
        self.losses = Losses(self.standing.window, lesson.course.device)
        self.stable = extend.stable_step(lesson.config.model_dump())
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
            figures = run_folder.finite(scoring.judge(logits, self.watched))
            self.run.metrics.write("teacher", 0, teacher=member.name, split=self.watched.name, **figures, **form)
        if len(members) > 1:
            figures = run_folder.finite(scoring.judge(taught.together, self.watched))
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
            hasten(self.lesson.student, course, config, config.side or 0)

    def steps(self, loss_of: LossOf, ahead: Callable[[Batch], Batch] | None, caught: Sequence[int]) -> Iterator[int]:
        """Takes a step each time it is asked for one, and gives its number.

        Args:
            caught: the signals that came until now; after one the run is saved, and `Stopped` raised.
        """
        config, course, student = self.lesson.config, self.lesson.course, self.lesson.student
        start = self.standing.step
        finish = ahead or transfers.pinner(course.device)
        batches = prefetch(self.lesson.loader, start, course.steps, workers=workers_of(self.lesson), finish=finish)
        if self.tired:  # it was stopped between its end and its last record
            return
        with (
            oom.told(self.lesson.loader, course, student, self.optimizer, loss_of),
            self.keeper,
            closing(batches),
            watched(self.lesson, self.run.folder) as seen,
        ):
            self.clock = time.monotonic()
            for step, loss in fit(course, student, self.optimizer, self.scaler, batches, loss_of, start):
                self.standing.step = step
                self.losses.add(loss)
                if self.average:
                    self.average.follow(student, step)
                last = step == course.steps
                stop = distributed.greatest(caught[0] if caught else 0)
                judged = last or step % config.eval_every == 0
                saved = last or step % config.save_every == 0 or step == self.stable or stop > 0
                with span("logging"):
                    self.record(due=last or step % config.log_every == 0, wait=judged or saved)
                if judged or saved:
                    self.check_weights()
                if judged and env.is_first():
                    self.watch()
                tired = self.tired if judged else False
                if tired:
                    self.record(due=True, wait=True)
                if saved or tired:
                    self.save()
                if step == self.stable:
                    self.keep_stable()
                seen()
                yield step
                if tired:
                    break
                if stop and not last:
                    self.settle()
                    told = f"saved step {step} of {course.steps} in {self.run.folder}"
                    raise signals.Stopped(stop, f"{told}; the same command goes on from there")

    @property
    def tired(self) -> bool:
        """Whether validation has not liked the student better for as long as patience lasts."""
        patience = self.lesson.config.patience
        return patience is not None and distributed.greatest(self.standing.since_best) >= patience

    def record(self, *, due: bool, wait: bool) -> None:
        """Records the mean loss since the last time.

        Args:
            due: whether it is time to: the losses begin to be fetched, and are recorded when they have arrived.
            wait: record now what was to be recorded.
        """
        if due and self.losses.new:
            self.write_record(wait=True)
            self.losses.ask(self.standing.step)
            self.standing.window = []
        self.write_record(wait=wait)

    def write_record(self, *, wait: bool) -> None:
        told = self.losses.told(wait=wait)
        if told is None:
            return
        now, lr = time.monotonic(), self.lesson.course.lr_at(told.step - 1)
        rate = told.steps * self.lesson.config.batch / (now - self.clock - self.away)
        self.standing.seconds += now - self.clock
        self.run.metrics.write("step", told.step, loss=told.loss, lr=lr, images_per_second=rate)
        self.notes["loss"] = f"loss {told.loss:.4f}, {rate:,.0f} images/s"
        self.clock, self.away = now, 0.0

    def check_weights(self) -> None:
        """Raises `InputError` if an update has ruined the student."""
        if not torch.stack([tensor.isfinite().all() for tensor in self.lesson.student.parameters()]).all():
            raise ruined("the student's weights are", self.standing.step)

    def watch(self) -> None:
        """Judges the student on the watched split, and keeps it if it is the best so far."""
        standing, view, began = self.standing, self.lesson.view, time.monotonic()
        logits = scoring.answers(self.lesson.student, self.watched, view)
        figures = scoring.judge(logits, self.watched, self.teacher_logits)
        self.run.metrics.write("eval", standing.step, split=self.watched.name, **run_folder.finite(figures))
        if self.average:
            averaged = scoring.answers(self.average.model, self.watched, self.lesson.view)
            own = run_folder.finite(scoring.judge(averaged, self.watched, self.teacher_logits))
            self.run.metrics.write("ema", standing.step, split=self.watched.name, **own)
        if self.both:
            on_views = scoring.on_views(self.both, self.lesson.student, self.lesson.loader, standing.step, view)
            self.run.metrics.write("views", standing.step, **run_folder.finite(on_views))
        name = "agreement" if figures["top1"] is None else "top1"
        score = figures[name]
        self.notes["eval"] = f"{name} {percent(score)}"
        # Test pictures are never chosen on, so without a validation split there is no best.
        standing.since_best += 1
        if score is not None and score > standing.best_score and self.watched.name != "test":
            standing.best_step, standing.best_score, standing.since_best = standing.step, score, 0
            self.save_best(run_folder.finite(figures))
        if self.lesson.trial and score is not None:
            self.lesson.trial.told(standing.step, score)
        self.away += time.monotonic() - began

    def save_best(self, figures: dict[str, Any]) -> None:
        """Has the student kept as the one that validation likes most."""
        tensors = transfers.snapshot({checkpoint.STUDENT: self.lesson.student.net.state_dict()})
        self.keeper.later(partial(checkpoint.save_best, self.run.checkpoints, self.standing.step, tensors, figures))

    def save(self) -> None:
        """Has a checkpoint written."""
        began = time.monotonic()
        self.standing.scaler = self.scaler.state_dict()
        # Losses that no record holds yet go along, so that a resumed run records what one that never stopped does.
        state, step = asdict(self.standing) | {"window": self.losses.window(self.standing.step)}, self.standing.step
        if env.is_first():
            net = self.lesson.student.net
            tensors = transfers.snapshot(checkpoint.tensors_of(net, self.optimizer, self.average_net))
            self.keeper.later(lambda: checkpoint.save(self.run.checkpoints, step, tensors, state))
        self.away += time.monotonic() - began

    def keep_stable(self) -> None:
        """Keeps the checkpoint of this step, from which the run can be prolonged."""
        if env.is_first():
            self.keeper.later(partial(checkpoint.keep_stable, self.run.checkpoints, self.standing.step))

    def settle(self) -> None:
        """Waits until all checkpoints lie there; no process ends before."""
        self.keeper.settle()
        distributed.wait()

    def finish(self) -> dict[str, Any]:
        """Judges the finished student, writes it for use elsewhere, and records that the run is over."""
        lesson, view = self.lesson, self.lesson.view
        self.keeper.settle()
        self.standing.seconds += time.monotonic() - self.clock
        if lesson.config.keep == "best" and self.standing.best_step is not None:
            checkpoint.load_best(self.run.checkpoints, self.standing.best_step, lesson.student.net)
        split = scoring.final(lesson.cache)
        teacher_logits = self.teacher_logits
        if lesson.teachers and split.name != self.watched.name:
            teacher_logits, _ = loading.answers(lesson.teachers, split, view)
        figures = scoring.judge(scoring.answers(lesson.student, split, view), split, teacher_logits)
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
            own = scoring.judge(teacher_logits, split)
            result["teacher"] = {
                "name": lesson.teachers.name,
                "parameters": lesson.teachers.count(),
                "top1": own["top1"],
            }
        if self.average:
            result["ema"] = scoring.judge(scoring.answers(self.average.model, split, view), split, teacher_logits)
            written(lesson, self.average.model, self.run.folder / "student-ema", result["ema"]["top1"])
        written(lesson, lesson.student, self.run.student, figures["top1"])
        self.run.finish(result)
        return run_folder.finite(result)

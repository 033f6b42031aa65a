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
from funmatch.ops.optim.updates import EMA
from funmatch.runtime import devices, distributed, env, signals, transfers
from funmatch.runtime.log import ProgressBar, info
from funmatch.runtime.text import percent
from funmatch.runtime.timing import timed
from funmatch.training import oom, scoring
from funmatch.training.acceleration import accelerate_student
from funmatch.training.export import export_student
from funmatch.training.loop import fit
from funmatch.training.profiling import profile_training
from funmatch.training.run import checkpoint, extend
from funmatch.training.run import folder as run_folder
from funmatch.training.run.checkpoint_writer import CheckpointWriter
from funmatch.training.run.losses import LossMeter, not_finite
from funmatch.training.run.state import TeacherLogits, TrainState
from funmatch.training.setup import TrainSetup, build_optimizer, count_workers, extend_run, run_record
from funmatch.training.teachers import loading

LossOf = Callable[[Batch], Tensor]


def run_training(
    lesson: TrainSetup,
    loss_of: LossOf,
    taught: TeacherLogits | None = None,
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
    extend_run(lesson)
    knobs, facts = run_record(lesson)
    with run_folder.open_run(lesson.config.out, lesson.verb, knobs, facts) as run:
        if result := distributed.broadcast_from_main(lambda: run.result):
            info(f"{run.folder} is finished at step {result['step']}; nothing to do")
            return result
        walk = Trainer(lesson, run, taught, both)
        walk.run_to_end(loss_of, ahead)
        return distributed.broadcast_from_main(walk.finish)


class Trainer:
    """A run under way: the loop's own `for`, and what is recorded, judged and saved beside it."""

    def __init__(
        self,
        lesson: TrainSetup,
        run: run_folder.Run,
        taught: TeacherLogits | None,
        both: Callable[[Batch], tuple[Tensor, Tensor]] | None,
    ) -> None:
        self.lesson, self.run, self.both = lesson, run, both
        self.teacher_logits = taught.combined if taught else None
        self.watched = scoring.validation_split(lesson.cache)
        self.optimizer = build_optimizer(lesson)
        self.scaler = devices.loss_scaler(lesson.loop.device, lesson.loop.precision)
        self.average = EMA(lesson.student, lesson.config.ema) if lesson.config.ema is not None else None
        self.state = TrainState()
        self.keeper = CheckpointWriter()
        self.clock, self.away = time.monotonic(), 0.0
        self.notes: dict[str, str] = {}
        state = distributed.main_process_first(
            lambda: checkpoint.restore(run.checkpoints, lesson.student.net, self.optimizer, self.average_net)
        )
        if state:
            self.state = TrainState(**state)
            self.scaler.load_state_dict(self.state.scaler)
            info(f"{run.folder}: going on from step {self.state.step} of {lesson.loop.steps}")
        self.losses = LossMeter(self.state.window, lesson.loop.device)
        self.stable = extend.stable_step(lesson.config.model_dump())
        if self.state.step and self.state.step == self.stable:
            self.keep_stable()
        run.metrics.truncate(self.state.step or -1)
        if taught and not self.state.step:
            self.record_teachers(taught)

    @property
    def average_net(self) -> nn.Module | None:
        return self.average.model.net if self.average else None

    def record_teachers(self, taught: TeacherLogits) -> None:
        """Records how good the teachers are on the watched split: each, and together where there are several."""
        assert self.lesson.teachers
        members = self.lesson.teachers.members
        known = zip(members, taught.members, self.lesson.provenance["teacher_forms"], strict=True)
        for member, logits, form in known:
            figures = run_folder.finite(scoring.score(logits, self.watched))
            self.run.metrics.write("teacher", 0, teacher=member.name, split=self.watched.name, **figures, **form)
        if len(members) > 1:
            figures = run_folder.finite(scoring.score(taught.combined, self.watched))
            self.run.metrics.write("teacher", 0, teacher=self.lesson.teachers.name, split=self.watched.name, **figures)

    def run_to_end(self, loss_of: LossOf, ahead: Callable[[Batch], Batch] | None) -> None:
        """Takes all steps that are left."""
        self.compile()
        with (
            ProgressBar(self.lesson.verb, self.lesson.loop.steps, self.state.step) as bar,
            signals.catch_signals() as caught,
        ):
            for step in self.steps(loss_of, ahead, caught):
                bar.update(step, " ".join(self.notes.values()))

    def compile(self) -> None:
        """Compiles the student, if it is to be and has steps to go."""
        config, course = self.lesson.config, self.lesson.loop
        if self.state.step < course.steps:
            accelerate_student(self.lesson.student, course, config, config.side or 0)

    def steps(self, loss_of: LossOf, ahead: Callable[[Batch], Batch] | None, caught: Sequence[int]) -> Iterator[int]:
        """Takes a step each time it is asked for one, and gives its number.

        Args:
            caught: the signals that came until now; after one the run is saved, and `Stopped` raised.
        """
        config, course, student = self.lesson.config, self.lesson.loop, self.lesson.student
        start = self.state.step
        finish = ahead or transfers.pin_batch(course.device)
        batches = prefetch(self.lesson.loader, start, course.steps, workers=count_workers(self.lesson), finish=finish)
        if self.early_stop_due:  # it was stopped between its end and its last record
            return
        with (
            oom.explain_out_of_memory(self.lesson.loader, course, student, self.optimizer, loss_of),
            self.keeper,
            closing(batches),
            profile_training(self.lesson, self.run.folder) as seen,
        ):
            self.clock = time.monotonic()
            for step, loss in fit(course, student, self.optimizer, self.scaler, batches, loss_of, start):
                self.state.step = step
                self.losses.add(loss)
                if self.average:
                    self.average.update(student, step)
                last = step == course.steps
                stop = distributed.all_reduce_max(caught[0] if caught else 0)
                judged = last or step % config.eval_every == 0
                saved = last or step % config.save_every == 0 or step == self.stable or stop > 0
                with timed("logging"):
                    self.record(due=last or step % config.log_every == 0, wait=judged or saved)
                if judged or saved:
                    self.check_weights()
                if judged and env.is_main_process():
                    self.evaluate()
                tired = self.early_stop_due if judged else False
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
                    self.flush()
                    told = f"saved step {step} of {course.steps} in {self.run.folder}"
                    raise signals.Interrupted(stop, f"{told}; the same command goes on from there")

    @property
    def early_stop_due(self) -> bool:
        """Whether validation has not liked the student better for as long as patience lasts."""
        patience = self.lesson.config.patience
        return patience is not None and distributed.all_reduce_max(self.state.since_best) >= patience

    def record(self, *, due: bool, wait: bool) -> None:
        """Records the mean loss since the last time.

        Args:
            due: whether it is time to: the losses begin to be fetched, and are recorded when they have arrived.
            wait: record now what was to be recorded.
        """
        if due and self.losses.new:
            self.write_record(wait=True)
            self.losses.start_fetch(self.state.step)
            self.state.window = []
        self.write_record(wait=wait)

    def write_record(self, *, wait: bool) -> None:
        told = self.losses.take_record(wait=wait)
        if told is None:
            return
        now, lr = time.monotonic(), self.lesson.loop.lr_at(told.step - 1)
        rate = told.steps * self.lesson.config.batch / (now - self.clock - self.away)
        self.state.seconds += now - self.clock
        self.run.metrics.write("step", told.step, loss=told.loss, lr=lr, images_per_second=rate)
        self.notes["loss"] = f"loss {told.loss:.4f}, {rate:,.0f} images/s"
        self.clock, self.away = now, 0.0

    def check_weights(self) -> None:
        """Raises `InputError` if an update has ruined the student."""
        if not torch.stack([tensor.isfinite().all() for tensor in self.lesson.student.parameters()]).all():
            raise not_finite("the student's weights are", self.state.step)

    def evaluate(self) -> None:
        """Judges the student on the watched split, and keeps it if it is the best so far."""
        standing, view, began = self.state, self.lesson.view, time.monotonic()
        logits = scoring.predict(self.lesson.student, self.watched, view)
        figures = scoring.score(logits, self.watched, self.teacher_logits)
        self.run.metrics.write("eval", standing.step, split=self.watched.name, **run_folder.finite(figures))
        if self.average:
            averaged = scoring.predict(self.average.model, self.watched, self.lesson.view)
            own = run_folder.finite(scoring.score(averaged, self.watched, self.teacher_logits))
            self.run.metrics.write("ema", standing.step, split=self.watched.name, **own)
        if self.both:
            on_views = scoring.score_training_views(
                self.both, self.lesson.student, self.lesson.loader, standing.step, view
            )
            self.run.metrics.write("views", standing.step, **run_folder.finite(on_views))
        name = "agreement" if figures["top1"] is None else "top1"
        score = figures[name]
        self.notes["eval"] = f"{name} {percent(score)}"
        # Test images are never chosen on, so without a validation split there is no best.
        standing.since_best += 1
        if score is not None and score > standing.best_score and self.watched.name != "test":
            standing.best_step, standing.best_score, standing.since_best = standing.step, score, 0
            self.save_best(run_folder.finite(figures))
        if self.lesson.trial and score is not None:
            self.lesson.trial.report(standing.step, score)
        self.away += time.monotonic() - began

    def save_best(self, figures: dict[str, Any]) -> None:
        """Has the student kept as the one that validation likes most."""
        tensors = transfers.snapshot({checkpoint.STUDENT: self.lesson.student.net.state_dict()})
        self.keeper.submit(partial(checkpoint.save_best, self.run.checkpoints, self.state.step, tensors, figures))

    def save(self) -> None:
        """Has a checkpoint written."""
        began = time.monotonic()
        self.state.scaler = self.scaler.state_dict()
        # Losses that no record holds yet go along, so that a resumed run records what one that never stopped does.
        state, step = asdict(self.state) | {"window": self.losses.window(self.state.step)}, self.state.step
        if env.is_main_process():
            net = self.lesson.student.net
            tensors = transfers.snapshot(checkpoint.tensors_of(net, self.optimizer, self.average_net))
            self.keeper.submit(lambda: checkpoint.save(self.run.checkpoints, step, tensors, state))
        self.away += time.monotonic() - began

    def keep_stable(self) -> None:
        """Keeps the checkpoint of this step, from which the run can be prolonged."""
        if env.is_main_process():
            self.keeper.submit(partial(checkpoint.keep_stable, self.run.checkpoints, self.state.step))

    def flush(self) -> None:
        """Waits until all checkpoints lie there; no process ends before."""
        self.keeper.flush()
        distributed.barrier()

    def finish(self) -> dict[str, Any]:
        """Judges the finished student, writes it for use elsewhere, and records that the run is over."""
        lesson, view = self.lesson, self.lesson.view
        self.keeper.flush()
        self.state.seconds += time.monotonic() - self.clock
        if lesson.config.keep == "best" and self.state.best_step is not None:
            checkpoint.load_best(self.run.checkpoints, self.state.best_step, lesson.student.net)
        split = scoring.test_split(lesson.cache)
        teacher_logits = self.teacher_logits
        if lesson.teachers and split.name != self.watched.name:
            teacher_logits, _ = loading.predict(lesson.teachers, split, view)
        figures = scoring.score(scoring.predict(lesson.student, split, view), split, teacher_logits)
        result: dict[str, Any] = figures | {
            "split": split.name,
            "pictures": len(split),
            "step": self.state.step,
            "best_step": self.state.best_step,
            "best_score": self.state.best_score if self.state.best_step is not None else None,
            "seconds": round(self.state.seconds, 1),
            "parameters": lesson.student.count_parameters(),
            "run": str(self.run.folder),
        }
        if lesson.teachers and teacher_logits is not None:
            own = scoring.score(teacher_logits, split)
            result["teacher"] = {
                "name": lesson.teachers.name,
                "parameters": lesson.teachers.count_parameters(),
                "top1": own["top1"],
            }
        if self.average:
            result["ema"] = scoring.score(scoring.predict(self.average.model, split, view), split, teacher_logits)
            export_student(lesson, self.average.model, self.run.folder / "student-ema", result["ema"]["top1"])
        export_student(lesson, lesson.student, self.run.student, figures["top1"])
        self.run.finish(result)
        return run_folder.finite(result)

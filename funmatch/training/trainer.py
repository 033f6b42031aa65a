"""Trains a run to its end: drives the training loop, logs, evaluates, and writes checkpoints."""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

from funmatch.data.loader import Batch
from funmatch.data.prefetch import prefetch
from funmatch.data.readers.split_names import TRAINING_IMAGES
from funmatch.ops.metrics import has_diverged
from funmatch.runtime import devices, distributed, env, heartbeat, signals, time_limit
from funmatch.runtime.log import ProgressBar, info
from funmatch.runtime.text import percent
from funmatch.runtime.timing import timed
from funmatch.training import nonfinite, oom, stopping
from funmatch.training.evaluation.evaluator import Evaluator
from funmatch.training.evaluation.outcome import deciding_metric
from funmatch.training.loop import Losses, fit
from funmatch.training.objective import Objective
from funmatch.training.profiling import profile_training
from funmatch.training.run import extend, intervals, longer
from funmatch.training.run import folder as run_folder
from funmatch.training.run.checkpoints import Checkpoints
from funmatch.training.run.loss_log import LossLog
from funmatch.training.run.recorder import Recorder
from funmatch.training.run.state import TrainState, check_weights
from funmatch.training.setup import TrainSetup, run_record
from funmatch.training.student.acceleration import accelerate_student


def run_training(setup: TrainSetup[Any], objective: Objective) -> dict[str, Any]:
    """Trains a run from its newest checkpoint to its end.

    Returns:
        the metrics, as in `result.json`.

    Raises:
        InputError: the folder holds another run, or the loss is not finite any more.
        Interrupted: by a signal, or shortly before the time limit, after saving.
    """
    options, facts = run_record(setup)
    with run_folder.open_run(setup.config.out, setup.inputs.verb, options, facts) as run:
        trainer = Trainer(setup, run, objective)
        trainer.run_to_end()
        # The main process evaluates and writes; all return its metrics.
        return distributed.broadcast_from_main(trainer.finish)


class Trainer:
    """Trains one run step by step.

    Attributes:
        state: the run's progress, as checkpoints hold it.
        notes: latest evaluation, for the progress bar.
        records: writes records of metrics; if the user's `on_event` fails, the run ends after the next step.
    """

    def __init__(self, setup: TrainSetup[Any], run: run_folder.Run, objective: Objective) -> None:
        """Resumes from the newest checkpoint of the run folder, if there is one."""
        self.setup, self.run, self.objective = setup, run, objective
        self.student = setup.student
        self.evaluator = Evaluator(setup, objective)
        self.scaler = devices.loss_scaler(setup.loop.device, setup.loop.precision)
        self.state = TrainState()
        best = setup.config.keep == "best"
        self.checkpoints = Checkpoints(run.checkpoints, self.student, self.scaler, needs_best=best)
        self.notes: dict[str, str] = {}
        self.records = Recorder(run.metrics, setup.inputs.on_event)
        if state := self.checkpoints.restore():
            self.state = state
            info(f"{run.folder}: resuming from step {self.state.step} of {setup.loop.steps}")
        self.losses = LossLog(self.state, self.records, setup.loop, setup.config.batch)
        limit = time_limit.find_limit(setup.config.time_limit)
        self.stopping = stopping.Stopping(limit, self.records, self.checkpoints.writer)
        self.stable = extend.stable_step(setup.config.model_dump())
        # A process killed between saving this step and keeping it did only the first.
        if self.state.step and self.state.step == self.stable:
            self.checkpoints.keep_stable(self.state.step)
        if env.is_main_process() and run.metrics.has_changed(self.state.log_bytes, self.state.log_crc):
            run.metrics.warn_of_change()
            self.state.log_damaged = True
        # What was logged after the checkpoint will be logged again.
        run.metrics.truncate(self.state.step or -1)
        if not self.state.step:
            for record in self.evaluator.teachers():
                self.records.write("teacher", 0, record)

    def run_to_end(self) -> None:
        """Takes all remaining steps."""
        self.compile()
        with (
            ProgressBar(self.setup.inputs.verb, self.setup.loop.steps, self.state.step) as bar,
            signals.catch_signals(self.setup.config.save_signals) as requests,
        ):
            for step in self.steps(requests):
                bar.update(step, self.note)

    def note(self) -> str:
        """Returns what stands beside the progress bar."""
        return ", ".join(each for each in (self.losses.note, *self.notes.values()) if each)

    def compile(self) -> None:
        """Sets up compilation or native kernels, if there are steps left."""
        config, loop = self.setup.config, self.setup.loop
        if self.state.step < loop.steps:
            kinds = self.setup.provenance["kernels"]
            accelerate_student(self.student.classifier, loop, config, config.side or 0, kinds)

    def steps(self, requests: signals.Requests) -> Iterator[int]:
        """Takes one step per iteration, and yields its number.

        Args:
            requests: what signals ask for; where they ask to stop, the run is saved, and `Interrupted` raised.
        """
        setup, loop, objective = self.setup, self.setup.loop, self.objective
        student, optimizer = self.student.classifier, self.student.optimizer
        start = self.state.step
        finish = objective.ahead or partial(Batch.pin_memory, device=loop.device)
        batches = prefetch(objective.batches, start, loop.steps, workers=setup.workers, finish=finish)
        # Early stopping may have been due when the process was killed before it recorded the end.
        if self.early_stop_due:
            return
        with (
            # Outermost: batches and profile are closed before it measures how much memory a step needs.
            oom.explain_out_of_memory(objective.batches, loop, student, optimizer, objective.loss),
            nonfinite.explained(setup, objective, self.run),
            self.checkpoints.writer,
            closing(batches),
            profile_training(setup, objective.teachers, self.run.folder) as profiled,
        ):
            self.losses.start_clock()  # set-up and compilation are not training
            self.stopping.begin(requests)
            left_out: list[int] | None = None if setup.config.on_nonfinite == "stop" else []
            if setup.config.on_nonfinite == "rewind" and not start:
                self.save()  # the first weights, to which the run may have to return
            for step, losses in fit(loop, student, optimizer, self.scaler, batches, objective.loss, start, left_out):
                reason = self.stopping.agree(evaluates_next=intervals.due_at(setup.config, step + 1).evaluated)
                if left_out:
                    self.leave_out(left_out.pop())
                else:
                    self.add_step(step, losses)
                ended = self.after_step(step, saving=reason != stopping.GO_ON)
                profiled()
                yield step
                if ended:
                    break
                if reason > stopping.SAVE and step < loop.steps:
                    self.checkpoints.flush()
                    self.stopping.interrupt(reason, step, loop.steps, self.run.folder)
        # The last step's records: all is saved, but the run is not finished yet.
        if distributed.all_reduce_max(stopping.FAILED * bool(self.records.failure)):
            self.stopping.interrupt(stopping.FAILED, loop.steps, loop.steps, self.run.folder)

    def add_step(self, step: int, losses: Losses) -> None:
        """Adds an update to the run's progress."""
        self.state.step = step
        heartbeat.note_step(step)
        self.losses.add(losses)
        if self.student.ema:
            self.student.ema.update(self.student.classifier, step)

    def leave_out(self, step: int) -> None:
        """Passes over a step whose loss or gradient was not finite, or over all steps since the newest checkpoint.

        The steps that follow are those of any run: they depend on the seed and their number alone.
        """
        action, first, left_out = self.setup.config.on_nonfinite, step, self.state.left_out + 1
        nonfinite.check_budget(self.setup, step, left_out)
        if action == "rewind":
            self.losses.stop_clock()
            seconds = self.state.seconds
            self.checkpoints.flush()
            self.state = self.checkpoints.restore() or self.state
            first, self.state.seconds = self.state.step + 1, seconds
            self.run.metrics.truncate(self.state.step)
            self.losses = LossLog(self.state, self.records, self.setup.loop, self.setup.config.batch)
        self.state.step, self.state.left_out = step, left_out
        nonfinite.warn_left_out(self.setup, first, step, left_out)
        self.records.write("nonfinite", step, {"action": action, "first": first, "lr": self.setup.loop.lr_at(step - 1)})

    def after_step(self, step: int, *, saving: bool) -> bool:
        """Logs, evaluates and saves what is due after a step; returns whether early stopping is due.

        Args:
            saving: save now, since the run is being interrupted.
        """
        due = intervals.due_at(self.setup.config, step)
        evaluated, saved = due.evaluated, due.saved or step == self.stable or saving
        # Waits before a checkpoint: a loss that is not finite must stop the run while the last good one is there.
        with timed("logging"):
            self.losses.write(due=due.logged, wait=evaluated or saved)
        if evaluated or saved:
            # Before anything of a ruined student is saved; the losses first, which say at which step it began.
            self.losses.check_finite()
            check_weights(self.student.classifier, step)
        # Before `save`: the checkpoint holds the best score, and the count for early stopping.
        if evaluated and env.is_main_process():
            with self.losses.paused(), self.stopping.evaluating():
                self.evaluate()
        stopping = self.early_stop_due if evaluated else False
        if stopping:
            # The steps since the last record would otherwise be logged nowhere.
            self.losses.write(due=True, wait=True)
        if saved or stopping:
            self.save()
        if step == self.stable:
            self.checkpoints.keep_stable(step)  # after `save`, whose checkpoint the writer then copies
        return stopping

    @property
    def early_stop_due(self) -> bool:
        """Whether validation has not improved for as many evaluations as `patience` allows."""
        patience = self.setup.config.patience
        # The maximum over processes: the main one alone evaluates and counts, and all must stop at the same step.
        return patience is not None and distributed.all_reduce_max(self.state.since_best) >= patience

    def evaluate(self) -> None:
        """Evaluates the student on the validation split, and saves it if it is the best so far."""
        state = self.state
        records = self.evaluator.student_now(state.step)
        for event, record in records.items():
            self.records.write(event, state.step, record)
        name = deciding_metric(records["eval"])
        score = records["eval"][name]
        self.notes["eval"] = f"{name} {percent(score)}"
        # Never chosen on test images, nor on training images: without a validation split there is no best.
        state.since_best += 1
        others = self.setup.evaluation.validation.name in ("test", TRAINING_IMAGES)
        if score is not None and score > state.best_score and not others:
            state.best_step, state.best_score, state.since_best = state.step, score, 0
            scores = {name: value for name, value in records["eval"].items() if name != "split"}
            self.checkpoints.save_best(state.step, scores)
        # After saving the best: it may raise, to end the trial early.
        if self.setup.inputs.trial and score is not None:
            self.setup.inputs.trial.report(intervals.evaluations_until(self.setup.config, state.step), score)

    def save(self) -> None:
        """Saves a checkpoint of this step."""
        with self.losses.paused(), self.stopping.pausing():
            self.state.scaler = self.scaler.state_dict()
            self.state.log_bytes, self.state.log_crc = self.run.metrics.digest()
            self.checkpoints.save(self.losses.state_to_save())

    def finish(self) -> dict[str, Any]:
        """Evaluates the finished student, exports it, and records that the run is over."""
        self.checkpoints.writer.flush()  # the best student may still be being written
        self.losses.stop_clock()
        if self.setup.config.keep == "best" and self.state.best_step is not None:
            self.checkpoints.load_best(self.state.best_step)
        result = self.evaluator.result(self.state, self.run.folder)
        self.evaluator.export(result, self.run.folder)
        # After the export: a run with a result counts as finished, and its student is not written again.
        self.run.finish(result)
        # A trial of a search is as long as the others, and a run that diverged needs another learning rate, not time.
        outcomes = self.evaluator.task.outcomes(self.evaluator.student.num_classes)
        if not self.setup.inputs.trial and not has_diverged(result["kl"], outcomes):
            evaluations = [each for each in self.run.metrics.read() if each["event"] == "eval"]
            if said := longer.note(self.run.folder, self.run.config, evaluations, self.stable):
                info(said)
        return run_folder.finite(result)

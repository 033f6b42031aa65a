"""Evaluates the student and the teachers of a run, and exports the finished student."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from funmatch.data.cache.stores import CachedSplit
from funmatch.data.readers.split_names import TRAINING_IMAGES, describe_images
from funmatch.models.classifier import Classifier
from funmatch.ops.grids import TENSORFLOW
from funmatch.ops.tasks.task import task_of
from funmatch.runtime.log import info
from funmatch.training import datasets
from funmatch.training.evaluation import scoring
from funmatch.training.evaluation.outcome import describe_failure, guessing
from funmatch.training.matching.evaluation import FeatureEvaluation
from funmatch.training.objective import Objective
from funmatch.training.run import folder as run_folder
from funmatch.training.run.state import TrainState
from funmatch.training.setup import TrainSetup
from funmatch.training.student.export import export_student
from funmatch.training.teachers import predictions


class Evaluator:
    """Scores a run's student, the average of its weights, and its teachers."""

    def __init__(self, setup: TrainSetup[Any], objective: Objective) -> None:
        self.setup, self.objective = setup, objective
        self.student, self.ema = setup.student.classifier, setup.student.ema
        self.task = task_of(setup.config.task)
        # On the CPU, where predictions are compared.
        self.teacher_logits = objective.teacher_logits.combined if objective.teacher_logits else None
        matching, view = objective.matching, setup.evaluation.view
        self.features = FeatureEvaluation(matching, setup.cache, view) if matching else None

    def teachers(self) -> Iterator[dict[str, Any]]:
        """Yields a record of each teacher on the validation split, and of all combined where there are several."""
        teachers, logits = self.objective.teachers, self.objective.teacher_logits
        if not teachers or not logits:
            return
        split = self.setup.evaluation.validation
        modes = self.setup.provenance["teacher_forms"]
        # With the recorded mode: the scores are those of this arithmetic.
        for member, own, mode in zip(teachers.members, logits.members, modes, strict=True):
            if self.features:
                view = predictions.member_view(member, self.setup.evaluation.view)
                scores = run_folder.finite(self.features.teacher(member, own, split, view))
            else:
                scores = run_folder.finite(scoring.score(own, split))
            yield {"teacher": member.name, "split": split.name, **scores, **mode}
        classes = self.features.layout.classes if self.features else None
        if len(teachers.members) > 1 and classes != 0:
            scores = run_folder.finite(scoring.score(logits.combined[:, :classes], split))
            yield {"teacher": teachers.name, "split": split.name, **scores}

    def student_now(self, step: int) -> dict[str, dict[str, Any]]:
        """Evaluates the student; returns records by event: `eval`, `ema` (average), `views` (training views)."""
        split, view = self.setup.evaluation.validation, self.setup.evaluation.view
        # `eval` comes first and is always there: the trainer picks the best student by it.
        _, scores = self._score(self.student, split, self.teacher_logits)
        records = {"eval": scores}
        if self.ema:
            _, records["ema"] = self._score(self.ema.model, split, self.teacher_logits)
        events = {event: {"split": split.name, **run_folder.finite(scores)} for event, scores in records.items()}
        if self.objective.logits:
            # On views of the steps to come, which the student has not been trained on yet.
            answers = scoring.answer_training_views(
                self.objective.logits, self.student, self.objective.batches, step, view
            )
            events["views"] = run_folder.finite(self._score_views(answers))
        return events

    def _score(
        self, student: Classifier, split: CachedSplit, teacher_logits: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Predicts a split; returns the student's logits and its scores."""
        if self.features and teacher_logits is not None:
            return self.features.student(student, split, teacher_logits)
        logits = scoring.predict(student, split, self.setup.evaluation.view)
        return logits, dict(scoring.score(logits, split, teacher_logits))

    def _score_views(self, answers: scoring.ViewAnswers) -> dict[str, float | None]:
        if self.features is None:
            return scoring.score_views(answers, self.task)
        cosine = self.features.cosine(answers.student, answers.teacher).mean().item()
        classes = self.features.layout.classes
        scores = scoring.score_views(answers.first(classes), self.task) if classes else {"views": len(answers.student)}
        return scores | {"cosine": cosine}

    def result(self, state: TrainState, folder: Path) -> dict[str, Any]:
        """Evaluates the finished student; returns what `result.json` holds."""
        split, view, teachers = self.setup.evaluation.test, self.setup.evaluation.view, self.objective.teachers
        about = datasets.about_images(split, self.setup.cache, self.setup.config.val)
        # The trials of a search are many, and its own progress tells of them.
        if not self.setup.inputs.trial:
            self._say_kept(state)
            if note := scoring.describe_unlabelled_test(self.setup.cache, split):
                info(note)
            info(f"evaluating {describe_images(about['pictures'], about['split'], about.get('held_out_of'))} …")
        # The teachers' logits of the validation split were computed at the start; reuse them if that is also the test.
        teacher_logits = self.teacher_logits
        if teachers and split.name != self.setup.evaluation.validation.name:
            teacher_logits, _ = predictions.predict(teachers, split, view)
        logits, scores = self._score(self.student, split, teacher_logits)
        classes = self.features.layout.classes if self.features else None
        own_logits = None if teacher_logits is None else teacher_logits[:, :classes]
        result: dict[str, Any] = scores | {
            **about,
            **(guessing(logits, split, own_logits) if classes != 0 else {}),
            "step": state.step,
            "best_step": state.best_step,
            "best_score": state.best_score if state.best_step is not None else None,
            "seconds": round(state.seconds, 1),
            "parameters": self.student.count_parameters(),
            "run": str(folder),
        }
        if teachers and teacher_logits is not None and own_logits is not None:
            own = scoring.score(own_logits, split) if classes != 0 else {}
            about_teacher = {name: own.get(name) for name in ("top1", self.task.score)}
            result["teacher"] = {"name": teachers.name, "parameters": teachers.count_parameters()} | about_teacher
        if problem := describe_failure(result, self.student.num_classes):
            advice = "try another --lr, a longer --warmup-steps or more steps, with another --out"
            info(f"WARNING: the run {problem}; {advice}")
        if view.resample in TENSORFLOW and scores.get(self.task.score) is not None:
            # What whoever loads the student with timm will see: its transform always resizes with antialias.
            antialiased = scoring.predict(self.student, split, replace(view, resample="antialias"))
            result[f"{self.task.score}_antialias"] = scoring.score(antialiased, split)[self.task.score]
        if self.ema:
            _, result["ema"] = self._score(self.ema.model, split, teacher_logits)
        return result

    def _say_kept(self, state: TrainState) -> None:
        """Says which student is kept, and warns of one that was hardly trained: few images choose at random."""
        validation, config = self.setup.evaluation.validation, self.setup.config
        if config.keep != "best" or state.best_step is None:
            return
        images = describe_images(len(validation), validation.name)
        info(f"kept the weights of step {state.best_step:,} of {state.step:,}, the best on {images}")
        if state.best_step <= (config.warmup_steps or 0) < state.step:
            info(
                "WARNING: this step is in the warm-up: hold out more images (--val), evaluate less often "
                "(--eval-every), or keep the last weights (--keep last)"
            )

    def export(self, result: dict[str, Any], folder: Path) -> None:
        """Exports the student, and the average of its weights."""
        # A teacher's card is compared with its accuracy elsewhere, for which that on training images is no measure.
        known = result["split"] != TRAINING_IMAGES
        if self.ema:
            self._export(self.ema.model, folder / "student-ema", result["ema"] if known else {})
        self._export(self.student, folder / "student", result if known else {})

    def _export(self, student: Classifier, folder: Path, scores: Mapping[str, Any]) -> None:
        about: dict[str, object] = {"verb": self.setup.inputs.verb}
        about |= {name: scores.get(name) for name in ("top1", self.task.score)}
        export_student(student, folder, self.setup.evaluation.view, self._class_names(), about)

    def _class_names(self) -> tuple[str, ...] | None:
        """Returns names for the student's outputs: the data's, or the teacher's where the data has none."""
        cache, teachers = self.setup.cache, self.objective.teachers
        if not self.student.num_classes:
            return None
        if self.setup.class_names:
            return self.setup.class_names
        # Numbers as names would be worse than the teacher's real ones.
        if teachers and (cache.unnamed or not cache.classes):
            names = [member.frozen.classifier.card.classes for member in teachers.members]
            # The first that has names: the others have the same classes, perhaps under other names.
            return next(filter(None, names), None)
        return cache.classes or None

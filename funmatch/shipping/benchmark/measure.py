"""Measures models in several formats: size, accuracy, latency, throughput and memory."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch._dynamo

from funmatch.config.finished.benchmark import Benchmark
from funmatch.errors import InputError
from funmatch.models.names import GIVEN
from funmatch.ops.view_spec import Preprocessing
from funmatch.runtime import devices
from funmatch.runtime.log import ProgressBar, info
from funmatch.runtime.text import percent
from funmatch.shipping.benchmark import memory
from funmatch.shipping.benchmark.candidates import OK, Candidate
from funmatch.shipping.benchmark.formats import FORMATS, Machine, Subject, preprocessing_beside
from funmatch.shipping.benchmark.result import build_result, cores
from funmatch.shipping.benchmark.scores import EvaluationImages, open_images, score
from funmatch.shipping.benchmark.timing import Probe, Series, probe_batches, time_rounds
from funmatch.shipping.export.sidecars import PREPROCESSING
from funmatch.shipping.runtimes import require
from funmatch.training.evaluation import scoring
from funmatch.training.student.build import Modules
from funmatch.training.student.trained_model import TrainedModel, open_described_model
from funmatch.training.teachers import predictions

TAIL_CALLS = 200
"""Calls with one image that are timed, if there is time: of fewer there is no p99."""


def measure(options: Benchmark, given: Modules | None = None) -> dict[str, Any]:
    """Measures the models and their teachers in the chosen formats.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        `machine`, `versions`, `device`, `precision`, `threads`, `batches`, `spread`, `max_seconds`, `data`, `split`,
        `images` (None without any), `of_images`, `models` and `results`, a row for each format of each model.

    Raises:
        InputError: a model, its images or its teacher cannot be used, a runtime that was chosen is not installed, or
            no format could be measured.
    """
    given = given or {}
    if options.moved("formats"):
        # Chosen by name: skipping it would hide that nothing was measured.
        for module in (module for each in options.chosen_formats for module in FORMATS[each].needs):
            require(module)
    device = devices.pick_device(options.device)
    machine = Machine(device, devices.resolve_precision(options.precision, device), options.threads or cores())
    with _threads_of_torch(machine.threads), TemporaryDirectory() as folder:
        models = [open_described_model(options, name, given) for name in options.models if name not in options.files]
        images = open_images(options, models, machine, given)
        subjects = _subjects(options, models, images, Path(folder))
        candidates = [
            Candidate(subject, each)
            for subject in subjects
            for each in (options.chosen_formats if subject.model else ("",))
        ]
        _prepare(candidates, machine, options.batches)
        if images:
            _score(candidates, images)
        _time(candidates, options)
        if options.memory:
            _measure_memory(candidates, options, machine)
        if not any(each.status == OK for each in candidates):
            raise InputError(f"no format could be measured: {'; '.join(f'{c.key}: {c.reason}' for c in candidates)}")
        return build_result(options, machine, images, subjects, candidates)


def _subjects(
    options: Benchmark, models: Sequence[TrainedModel], images: EvaluationImages | None, folder: Path
) -> list[Subject]:
    """Returns what is measured: the models, their teachers, and files of runtimes, which see images as the first."""
    labels = _labels([each.name for each in models], "student" if any(each.run for each in models) else "model")
    maps = images.class_maps if images else (None,) * len(models)
    training = images.training if images else None
    found = [
        Subject(
            label, each.name, each.preprocessing, each, None, _folder(folder, f"model-{number}"), class_map, training
        )
        for number, (each, label, class_map) in enumerate(zip(models, labels, maps, strict=True))
    ]
    if images and images.teachers:
        members = images.teachers.members
        view = scoring.eval_view_of(models[0].preprocessing, options.batch, torch.device("cpu"), "fp32")
        for number, (member, label) in enumerate(
            zip(members, _labels([each.name for each in members], "teacher"), strict=True)
        ):
            shown = predictions.member_view(member, view)
            how = Preprocessing(**{each.name: getattr(shown, each.name) for each in fields(Preprocessing)})
            model = TrainedModel(member.name, member.frozen.classifier, how)
            place = _folder(folder, f"teacher-{number}")
            found.append(Subject(label, member.name, how, model, None, place, member.class_map, training))
    first = found[0].preprocessing if models else None
    return [*found, *(_subject_of_file(options, name, first, folder) for name in options.files)]


def _subject_of_file(options: Benchmark, name: str, first: Preprocessing | None, folder: Path) -> Subject:
    """Returns a file of a runtime; it sees images as its export says, else as the first model."""
    path = Path(name).expanduser()
    how = preprocessing_beside(path) or first
    if how is None and options.side:
        how = Preprocessing(side=options.side, short_side=options.eval_resize or options.side)
    if how is None:
        raise InputError(
            f"the image size of {path} is not known: there is no {PREPROCESSING} of `funmatch export` beside it; pass "
            "--side, or its run as well"
        )
    return Subject(path.name, name, how, None, path, folder)


def _labels(names: Sequence[str], alone: str) -> list[str]:
    """Returns names for tables: one word for a single model, else the last parts of paths where these differ."""
    if len(names) == 1:
        return [alone]
    short = [Path(each).name for each in names]
    return short if len(set(short)) == len(short) else list(names)


def _folder(parent: Path, name: str) -> Path:
    path = parent / name
    path.mkdir()
    return path


def _prepare(candidates: Sequence[Candidate], machine: Machine, batches: Sequence[int]) -> None:
    """Makes all formats ready, and finds the best batch size of each."""
    for each in candidates:
        info(f"preparing {each.key} …")
        each.prepare(machine)
        if not each.prepared:
            info(f"{each.key}: {each.status}: {each.reason}")
            continue
        sizes = sorted({1, *batches})
        if each.format and FORMATS[each.format].few_sizes:
            # Compiled for each size, which takes up to minutes: only for one that is good without compiling.
            same = [other.probe for other in candidates if other.subject is each.subject and other.probe]
            sizes = sorted({1, *(probe.images for probe in same[:1])}) if same else sizes
        probes = probe_batches(each.call, sizes)
        if error := probes[0].error:
            each.fail(error)
            info(f"{each.key}: {each.status}: {each.reason}")
            continue
        each.probe = _best(probes, batches)


def _best(probes: Sequence[Probe], batches: Sequence[int]) -> Probe:
    """Returns the batch size with the most images per second, of those that were chosen and can be computed."""
    chosen = [each for each in probes if each.images in batches and not each.error]
    return max(chosen or probes[:1], key=lambda probe: probe.rate)


def _score(candidates: Sequence[Candidate], images: EvaluationImages) -> None:
    for subject, group in groupby(candidates, key=lambda each: each.subject):
        ready = [each for each in group if each.prepared]
        if ready:
            with ProgressBar(f"evaluating {subject.label}", len(images.split)) as bar:
                score(ready, images, bar.update)


def _time(candidates: Sequence[Candidate], options: Benchmark) -> None:
    """Times all formats in turn: one image, and the best batch."""
    ready = [each for each in candidates if each.prepared]
    for each in ready:
        assert each.probe
        each.latency = Series(each.call(1), least_calls=TAIL_CALLS)
        # With one image both are the same.
        best = each.probe.images
        each.throughput = Series(each.call(best), images=best) if best > 1 else each.latency
    series = [part for each in ready for part in dict.fromkeys((each.latency, each.throughput)) if part]
    # Half of a format's time for each of its two measurements.
    limit, target = options.max_seconds / 2, options.largest_spread
    seconds = round(limit * len(series))
    with ProgressBar("timing", seconds) as bar:

        def report(rounds: int) -> None:
            settled = sum(each.is_settled(target) for each in series)
            spent = min(round(sum(each.spent for each in series)), seconds)
            bar.update(spent, f"round {rounds}, {settled} of {len(series)} within {percent(target)}")

        time_rounds(series, target, limit, after_round=report)
    for each in ready:
        for part in (each.latency, each.throughput):
            if part and (part.error or not part.rounds):
                each.fail(part.error or InputError("no call ended in time"))
                each.latency = each.throughput = None


def _measure_memory(candidates: Sequence[Candidate], options: Benchmark, machine: Machine) -> None:
    ready = [each for each in candidates if each.prepared]
    with ProgressBar("measuring memory", len(ready)) as bar:
        for number, each in enumerate(ready, 1):
            if each.prepared and not (each.prepared.paths == () and each.subject.name.startswith(GIVEN)):
                try:
                    each.memory = memory.measure(_job(each, options, machine))
                except InputError as error:
                    info(f"{each.key}: memory unknown: {error}")
            bar.update(number)


def _job(candidate: Candidate, options: Benchmark, machine: Machine) -> dict[str, Any]:
    """Returns what a process needs to load a format, for `memory.measure`."""
    subject, prepared = candidate.subject, candidate.prepared
    assert prepared
    job: dict[str, Any] = {"side": subject.preprocessing.side, "threads": machine.threads}
    if prepared.paths:
        return job | {"path": str(prepared.paths[0])}
    about: dict[str, Any] = {"model": subject.name, "weights": None, "model_kwargs": []}
    if subject.name in options.models:
        weights = str(options.weights) if options.weights else None
        about |= {"weights": weights, "model_kwargs": options.model_kwargs}
    return job | about | {"format": candidate.format, "device": str(machine.device), "precision": machine.precision}


@contextmanager
def _threads_of_torch(threads: int) -> Generator[None]:
    """Sets PyTorch's threads, and sets them back: the caller may have other work for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Each model and batch size is compiled anew; beyond 8, PyTorch would give up and compute uncompiled.
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    finally:
        torch.set_num_threads(before)

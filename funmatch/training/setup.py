"""Builds a run that is ready to begin: every default resolved; data, student and evaluation in place."""

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import timm
import torch
from torch import nn

from funmatch.config import Distill, Train, recipes
from funmatch.data.cache.device_store import DeviceStore, move_data_to_device
from funmatch.data.cache.open_cache import Cache
from funmatch.data.loader import Loader
from funmatch.errors import InputError
from funmatch.models.classifier import Classifier
from funmatch.models.timm_models import parse_options
from funmatch.ops.optim import factory
from funmatch.ops.optim.updates import EMA
from funmatch.runtime import devices, distributed, env
from funmatch.runtime.log import info
from funmatch.runtime.text import percent
from funmatch.training import datasets
from funmatch.training.defaults import resolve_defaults, source_shares, view_spec, warn_of_late_steps
from funmatch.training.evaluation import scoring
from funmatch.training.evaluation.scoring import Evaluation
from funmatch.training.loop import LoopOptions, loop_options
from funmatch.training.run import damage, extend
from funmatch.training.run import folder as run_folder
from funmatch.training.run.recorder import ON_EVENT, OnEvent
from funmatch.training.student import acceleration
from funmatch.training.student.build import Modules, Student, build_classifier, init_digest, sync_across_processes
from funmatch.training.student.quantization import quantize_layers
from funmatch.version import __version__

Options = TypeVar("Options", bound=Train)
Prepare = Callable[[Classifier, Any], nn.Module]
"""Prepares a student before its optimizer is made: (network, resolved options) to what its checkpoints hold besides."""


@dataclass(frozen=True)
class Trial:
    """A run as part of a search: it leaves the test images alone, and reports its progress.

    Attributes:
        report: called with the number of each evaluation, from 1, and its score; what it raises ends the run.
    """

    report: Callable[[int, float], None]


@dataclass(frozen=True)
class RunInputs(Generic[Options]):
    """The configuration and the data of a run.

    Attributes:
        verb: the command: train, finetune or distill.
        config: the options, all defaults resolved and the length in steps.
        cache: the images.
        provenance: facts that `config.json` records, besides those that `run_record` adds.
        trial: the search that the run is part of, or None.
        on_event: called on the main process with each record of the run's metrics, or None.
    """

    verb: str
    config: Options
    cache: Cache
    provenance: dict[str, Any]
    trial: Trial | None = None
    on_event: OnEvent | None = None


@dataclass(frozen=True)
class TrainSetup(Generic[Options]):
    """A run that is ready to begin, except for its loss.

    Attributes:
        inputs: its configuration and data.
        student: the network that is trained, its optimizer and its average.
        evaluation: splits and preprocessing of evaluation.
        loop: options of the training loop.
        loader: this process's share of the training batches.
        class_names: names of the student's outputs where they are not the data's (a teacher's classes), or None.
    """

    inputs: RunInputs[Options]
    student: Student
    evaluation: Evaluation
    loop: LoopOptions
    loader: Loader
    class_names: tuple[str, ...] | None = None

    @property
    def config(self) -> Options:
        return self.inputs.config

    @property
    def cache(self) -> Cache:
        return self.inputs.cache

    @property
    def provenance(self) -> dict[str, Any]:
        return self.inputs.provenance

    @property
    def workers(self) -> int:
        """Threads that prepare batches ahead."""
        # A device that crops by itself works through one queue, so more threads would only wait for each other.
        on_device = isinstance(self.loader.split.store, DeviceStore)
        return self.config.workers or (1 if on_device else devices.spare_threads())

    def with_provenance(self, **facts: Any) -> Self:
        """Returns the setup with facts added to its provenance."""
        return replace(self, inputs=replace(self.inputs, provenance=self.provenance | facts))


def open_data(config: Options, trial: Trial | None = None) -> tuple[Cache, Options]:
    """Opens the images of a run; decodes them into the cache the first time.

    Returns:
        the images, for a trial without their test split; and the options, which say what was held out for validation.

    Raises:
        InputError: there is no training split, or an option is wrong.
    """
    # What is cheap to check comes first: a misspelt optimizer must not fail after an hour of decoding.
    factory.check_optimizer_name(config.optimizer)
    parse_options(config.optimizer_kwargs)
    devices.pick_device(config.device)
    run_folder.check_place(config.out)
    # One process fills the cache; the others then read it.
    began = distributed.broadcast_from_main(lambda: run_folder.began_without_validation(config.out))
    cache, config = distributed.main_process_first(lambda: datasets.open_with_validation(config, began_without=began))
    counts = ", ".join(f"{len(split):,} {name}" for name, split in cache.splits.items())
    info(f"{cache.name}: {counts}; {cache.way} in {cache.folder}")
    if "train" not in cache.splits:
        raise InputError(f"{cache.name} has no training split; its splits: {', '.join(cache.splits)}")
    # A search must not choose options by test images, so its trials do not get any.
    if trial:
        splits = {name: split for name, split in cache.splits.items() if name != "test"}
        return replace(cache, splits=splits), config
    return cache, config


def build_setup(
    verb: str,
    config: Options,
    cache: Cache,
    *,
    num_classes: int,
    given: Modules | None = None,
    requested: Train | None = None,
    trial: Trial | None = None,
    prepare: Prepare | None = None,
) -> TrainSetup[Options]:
    """Builds the student and resolves every default that was left open.

    Args:
        verb: the command.
        num_classes: outputs of the student; 0 for features.
        given: modules from Python, by the names that stand for them.
        requested: the configuration as the user gave it, if `config` is no longer that.
        trial: the search that the run is part of, if any.
        prepare: called with the network before its optimizer is made.
    """
    # Recipe facts compare with what the user gave, not with what a rule made of it.
    requested, given = requested or config, given or {}
    device = devices.pick_device(config.device)
    _check_fits(config, cache)
    # Before any network is built, so that initialisation and measurements use as many threads as training.
    if config.threads:
        torch.set_num_threads(config.threads)
    # Before defaults: the image size and the arithmetic depend on the network.
    classifier = build_classifier(verb, config, cache, num_classes, given)
    facts = {"student": init_digest(verb, config, classifier, given)} | recipes.facts(requested)
    # The crop kernel is a fact, not an option: a resumed run must crop as it did, wherever it runs.
    facts |= acceleration.crop_kernel(config, cache.splits["train"])
    config = resolve_defaults(_with_earlier_warmup(config, requested), cache, classifier, device)
    facts |= acceleration.student_kernels(config, config.steps or 0, config.side or 0, classifier, device)
    # After the defaults, which decide how much of the device's memory pixels may take.
    cache = move_data_to_device(cache, device, config.device_gb or 0)
    warn_of_late_steps(config)
    # From the recorded fact, not from what is available now.
    sources = source_shares(config, cache.splits["train"])
    spec = view_spec(config, sources, native=facts["views"] == acceleration.NATIVE)
    return TrainSetup(
        RunInputs(verb, config, cache, facts, trial, given.get(ON_EVENT)),
        build_student(config, classifier, device, prepare),
        _evaluation(config, cache, device),
        loop_options(config, device),
        Loader(cache.splits["train"], spec, env.rank(), env.world_size()),
    )


def _evaluation(config: Train, cache: Cache, device: torch.device) -> Evaluation:
    """Returns the splits and the preprocessing of a resolved configuration's evaluations."""
    return Evaluation(
        scoring.validation_split(cache, config.val),
        scoring.test_split(cache, config.val, with_teacher=isinstance(config, Distill)),
        scoring.eval_view(config, device),
    )


def _check_fits(config: Train, cache: Cache) -> None:
    """Raises `InputError` if the options do not fit the data or the number of processes."""
    world_size = env.world_size()
    sources = source_shares(config, cache.splits["train"])
    total = sum(share for share, _ in sources)
    for name, (share, count) in zip(config.data, sources, strict=bool(sources)):
        info(f"{name}: {count:,} training images, {percent(share / total)} of each batch")
    # Shares must be equal: gradients are averaged over processes, each with the same weight.
    if config.batch % world_size:
        raise InputError(
            f"batch ({config.batch}) must be a multiple of {world_size}, the number of processes that share it"
        )
    if config.quantize and world_size > 1:
        # Each process would have ranges of its own, and a checkpoint holds those of one.
        raise InputError("quantize trains in a single process; start it without torchrun")
    if config.patience and "val" not in cache.splits:
        raise InputError(
            f"patience needs images for validation, and {cache.name} has none; leave out --patience, or pass --val 10%"
        )


def _with_earlier_warmup(config: Options, requested: Train) -> Options:
    """Returns the options with the warm-up of the run that is extended, if it is."""
    # The default grows with the length of a run; a longer warm-up would change steps that were already taken.
    if config.schedule != "wsd" or requested.warmup_steps is not None:
        return config
    warmup = distributed.broadcast_from_main(lambda: extend.warmup_of(config.out))
    return config if warmup is None else config.model_copy(update={"warmup_steps": warmup})


def build_student(
    config: Train, classifier: Classifier, device: torch.device, prepare: Prepare | None = None
) -> Student:
    """Moves the network to its device, makes it equal on all processes, and creates its optimizer.

    Args:
        config: the resolved options.
        prepare: called with the network before its optimizer is made.
    """
    # After its content was recorded, which is that of the plain network.
    if config.quantize:
        quantize_layers(classifier.net)
    # After that: what it adds is for training alone, and stays exact.
    memory = prepare(classifier, config) if prepare else None
    classifier = sync_across_processes(classifier.to(device), device)
    assert config.lr is not None
    # After the move, since the optimizer refers to these very parameters, and the average is a copy of them on the same
    # device.
    optimizer = factory.create_optimizer(
        config.optimizer, classifier.net, config.lr, config.weight_decay,
        options=parse_options(config.optimizer_kwargs), **config.optimizer_arguments,
        sharded_map=distributed.sharded_map,
    )  # fmt: skip
    return Student(classifier, optimizer, EMA(classifier, config.ema) if config.ema is not None else None, memory)


def run_record(setup: TrainSetup[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of a run and its provenance: `knobs` and `facts` of its `config.json`."""
    facts = {
        "data": setup.cache.key,
        "teacher": None,
        # After the defaults above, which it may replace.
        **setup.provenance,
        "pictures": {name: len(split) for name, split in setup.cache.splits.items()},
        "classes": list(setup.class_names or setup.cache.classes),
        "parameters": setup.student.classifier.count_parameters(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {setup.loop.device}",
        "versions": {"funmatch": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    # As JSON: what is compared with the file must have its types.
    return setup.config.model_dump(mode="json"), facts


def finished_result(setup: TrainSetup[Any]) -> dict[str, Any] | None:
    """Returns the result of the run if it is finished with the same options; extends it first if it is to be longer."""
    out, verb = setup.config.out, setup.inputs.verb
    # The main process alone writes; the others must not look before it has.
    distributed.main_process_first(lambda: env.is_main_process() and extend.extend(out, verb, *run_record(setup)))
    result = distributed.broadcast_from_main(lambda: damage.result_if_same(out, verb, *run_record(setup)))
    if result:
        info(f"{out} is finished at step {result['step']}; nothing to do")
    return result


def recorded_modes(setup: TrainSetup[Any]) -> list[dict[str, Any]] | None:
    """Returns the inference modes of the teachers of a run that resumes, or None."""
    out, verb = setup.config.out, setup.inputs.verb
    # Read by one process: the others might see the folder before or after it changes.
    recorded = distributed.broadcast_from_main(lambda: run_folder.provenance_if_same(out, verb, *run_record(setup)))
    return recorded.get("teacher_forms")

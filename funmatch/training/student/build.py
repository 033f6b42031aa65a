"""Builds the student of a run: its network with initial weights, its optimizer, and the average of its weights."""

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from funmatch.config import Train
from funmatch.data.cache.open_cache import Cache
from funmatch.errors import InputError
from funmatch.models.classifier import Classifier, check_side, fingerprint
from funmatch.models.load import brings_weights, load
from funmatch.models.sync_batchnorm import sync_batchnorm
from funmatch.models.timm_models import checkpoint_activations, freeze_until, with_zero_head
from funmatch.ops.optim.updates import EMA
from funmatch.runtime import devices, distributed, env
from funmatch.runtime.chunks import even_chunks
from funmatch.runtime.log import info, info_notes
from funmatch.training.student.trained_model import constructor_options

Modules = dict[str, Any]
"""Objects that were given from Python, by the names that stand for them in the options: modules and functions."""


@dataclass(frozen=True)
class Student:
    """Everything that training changes.

    Attributes:
        classifier: the network, on its device.
        optimizer: of its trainable parameters.
        ema: exponential moving average of its weights, or None.
        memory: what matching features keeps of earlier batches, or None.
    """

    classifier: Classifier
    optimizer: torch.optim.Optimizer
    ema: EMA[Classifier] | None
    memory: nn.Module | None = None

    @property
    def others(self) -> dict[str, nn.Module]:
        """What checkpoints hold besides network and optimizer, by file: the averaged weights, and the memory."""
        average = {"average.safetensors": self.ema.model.net} if self.ema else {}
        return average | ({"matching.safetensors": self.memory} if self.memory else {})


def build_classifier(verb: str, config: Train, cache: Cache, num_classes: int, given: Modules) -> Classifier:
    """Builds the student's network with its initial weights, on the CPU.

    Args:
        verb: the command; fine-tuning gives a new head zeros.
        num_classes: number of its outputs.
        given: modules from Python, by the names that stand for them.

    Raises:
        InputError: it cannot be loaded, has another number of outputs, or fails on a batch of the run's size.
    """
    # Initial weights are drawn on the CPU, whose generator gives the same numbers on every machine.
    devices.seed_networks(config.seed, 0, torch.device("cpu"))
    # A copy: training must not change the module that the caller holds.
    student = load(
        copy.deepcopy(given.get(config.student, config.student)),
        weights=config.student_weights,
        options=constructor_options(config),
        classes=num_classes,
        side=config.side,
    )
    info_notes(config.student, [*student.notes, *([] if config.side else student.card.side_notes)])
    if student.num_classes and not num_classes:
        # A module from Python, or what a function makes, comes with a head.
        with_zero_head(student.net, 0)
        student.num_classes = 0
    if student.num_classes != num_classes:
        raise InputError(
            f"student {config.student} has {student.num_classes} outputs, but {num_classes} classes are needed"
        )
    # Whatever it was trained for before: these are its first weights.
    student.card = replace(student.card, task=config.task)
    # A zero head starts from equal probabilities, so the first gradients do not reach the pretrained weights.
    if verb == "finetune" and student.card.classes != cache.classes:
        with_zero_head(student.net, num_classes)
    # BatchNorm fails on the smallest micro-batch first, so that one is checked.
    chunks = even_chunks(config.batch // env.world_size(), config.micro_batch)
    smallest = min(stop - start for start, stop in pairwise(chunks))
    check_side(student, config.side or student.card.side, batch=smallest)
    if config.grad_checkpointing:
        checkpoint_activations(student)
    if config.freeze_until is not None:
        freeze_until(student, config.freeze_until)
    return student


def init_digest(verb: str, config: Train, student: Classifier, given: Modules) -> str | None:
    """Returns a digest of a student's initial weights; None where they follow from the seed."""
    # Random weights follow from seed and architecture, which are recorded anyway.
    drawn = config.student not in given and not config.student_weights and not brings_weights(config.student)
    if drawn and verb == "finetune":
        info(f"WARNING: {config.student} starts from random weights; give a pretrained tag or --weights")
    return None if drawn else fingerprint(student.net)


def sync_across_processes(student: Classifier, device: torch.device) -> Classifier:
    """Gives all processes equal weights, and BatchNorm the statistics of the global batch."""
    # A module from Python is built by each process, perhaps with other random weights.
    distributed.broadcast_(list(student.state_dict().values()))
    student.net = sync_batchnorm(student.net, device)
    return student

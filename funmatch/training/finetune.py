"""Fine-tunes a network with pretrained weights on labelled images, by BiT-HyperRule."""

from typing import Any

from funmatch.config import Finetune
from funmatch.ops.tasks.task import task_of
from funmatch.runtime import distributed
from funmatch.runtime.log import info
from funmatch.training.defaults import apply_hyperrule
from funmatch.training.setup import TrainSetup, Trial, build_setup, open_data
from funmatch.training.student.build import Modules
from funmatch.training.train import check_labels, run_on_labels


def run(config: Finetune, given: Modules | None = None, trial: Trial | None = None) -> dict[str, Any]:
    """Fine-tunes a network and returns the metrics of the finished run.

    Args:
        given: modules from Python, by the names that stand for them.
        trial: the search that the run is part of, if any.
    """
    with distributed.process_group(config.device, config.hang_timeout):
        return run_on_labels(build_finetune_setup(config, given, trial))


def build_finetune_setup(
    config: Finetune, given: Modules | None = None, trial: Trial | None = None
) -> TrainSetup[Finetune]:
    """Builds the run, with the options that were not given set by the rule."""
    cache, options = open_data(config, trial)
    ruled = apply_hyperrule(options, check_labels(options, cache))
    ruled.check()  # the rule may contradict what was given
    if options.lr is None and options.optimizer == "sgd":
        terms = task_of(options.task).loss_terms(len(cache.classes))
        # In proportion to the batch, so small where the batch is: the first thing to change if little is learnt.
        info(
            f"learning rate {ruled.lr:g} for {ruled.steps:,} steps (BiT-HyperRule: 0.003 × batch {ruled.batch} / 512"
            f"{'' if terms == 1 else f', times the {terms} classes whose mean the loss is'}); "
            "if accuracy stays low, set a larger --lr or more --steps"
        )
    classes = len(cache.classes)
    return build_setup("finetune", ruled, cache, num_classes=classes, given=given, requested=config, trial=trial)

"""Fine-tunes a network with pretrained weights on labelled images, by BiT-HyperRule."""

from typing import Any

from funmatch.config import Finetune
from funmatch.config.data import VALIDATION_SHARE
from funmatch.data.cache.open_cache import Cache
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
    with distributed.process_group(config.device):
        return run_on_labels(build_finetune_setup(config, given, trial))


def build_finetune_setup(
    config: Finetune, given: Modules | None = None, trial: Trial | None = None
) -> TrainSetup[Finetune]:
    """Builds the run, with the options that were not given set by the rule."""
    cache, options = with_validation(config, trial)
    ruled = apply_hyperrule(options, check_labels(options, cache))
    ruled.check()  # the rule may contradict what was given
    classes = len(cache.classes)
    return build_setup("finetune", ruled, cache, num_classes=classes, given=given, requested=config, trial=trial)


def with_validation(config: Finetune, trial: Trial | None = None) -> tuple[Cache, Finetune]:
    """Returns the images and the options, with a validation split held out where there is none."""
    cache = open_data(config, trial)
    # The weights to keep are chosen on validation images, which must not be the test images.
    if "val" in cache.splits or config.val is not None:
        return cache, config
    if config.eval_data:
        info(f"{cache.name} has no validation split; keeping the final weights")
        return cache, config.model_copy(update={"keep": "last"})
    info(
        f"{cache.name} has no validation split: holding out {VALIDATION_SHARE} of the training images (--val sets "
        "how many)"
    )
    # Opened again, since the cache has another training split then.
    config = config.model_copy(update={"val": VALIDATION_SHARE})
    return open_data(config, trial), config

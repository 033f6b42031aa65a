"""Declares all options: one frozen table per command, with each option described where it is declared."""

from funmatch.config.data import Cache, Data, Images, Named, Prepare
from funmatch.config.distill import TAUGHT, Distill
from funmatch.config.finished.benchmark import Benchmark
from funmatch.config.finished.evaluate import Evaluate
from funmatch.config.finished.export import Export
from funmatch.config.finished.head import Head
from funmatch.config.finished.predict import Embed, ImageOptions, Predict, PredictionOptions
from funmatch.config.finished.select import Select
from funmatch.config.metadata import Changes, Group, Opt
from funmatch.config.optim import Schedule
from funmatch.config.options import Machine, Options, options_changing
from funmatch.config.search import PLANNED, SEARCHED, Plan, Search, SearchDistill, SearchFinetune, SearchTrain
from funmatch.config.teaching import Teaching
from funmatch.config.tools import Config, Demo, Import, Models, Recipes, Report, Study, Tape
from funmatch.config.train import Finetune, Train
from funmatch.config.values import Precision

# Kept for users who import them by these names.
Pictures = Images
Words = tuple[str, ...]

UNCOMPARED = frozenset(name for table in TAUGHT.values() for name in table.where(lambda opt: not opt.is_compared))
"""The options that a run may have otherwise when it resumes."""

__all__ = [
    "PLANNED", "SEARCHED", "TAUGHT", "UNCOMPARED", "Benchmark", "Cache", "Changes", "Config", "Data", "Demo", "Distill",
    "Embed", "Evaluate", "Export", "Finetune", "Group", "Head", "ImageOptions", "Images", "Import", "Machine", "Models",
    "Named", "Opt", "Options", "Pictures", "Plan", "Precision", "Predict", "PredictionOptions", "Prepare", "Recipes",
    "Report", "Schedule", "Search", "SearchDistill", "SearchFinetune", "SearchTrain", "Select", "Study", "Tape",
    "Teaching", "Train", "Words", "options_changing",
]  # fmt: skip

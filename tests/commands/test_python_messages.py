"""Messages in Python's words: flags become arguments, and commands of the command line keep theirs."""

import pytest

from funmatch.commands.python.messages import in_python
from funmatch.config import Distill, Finetune


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("give the length by either --steps or --epochs, e.g. --epochs 1000",
         "give the length by either steps=… or epochs=…, e.g. epochs=1000"),
        ("has none; pass --val 10%", 'has none; pass val="10%"'),
        ("a staircase needs --decay-steps, e.g. --decay-steps 200 300 400",
         "a staircase needs decay_steps, e.g. decay_steps=[200, 300, 400]"),
        ("the rate is --lr 3e-4.", "the rate is lr=3e-4."),
        ("pass --classes same-names or --classes map.json, or --trust-class-order if only names differ",
         'pass classes="same-names" or classes="map.json", or trust_class_order=True if only names differ'),
        ("belongs to --schedule wsd, not cosine", 'belongs to schedule="wsd", not cosine'),
        ("pass --no-mixup-max", "pass mixup_max=False"),
        ("choose another --out", "choose another out"),
        ("does not support --grad-checkpointing", "does not support grad_checkpointing"),
        ("first: funmatch study NAME --out runs/a", "first: funmatch study NAME --out runs/a"),
        ("as `distill --teacher` takes them", "as `distill --teacher` takes them"),
        ("with torchrun --nproc-per-node 2", "with torchrun --nproc-per-node 2"),
        ("2 problems:\n  out is missing\n  data is missing",
         "2 problems:\n  out is missing; pass out=…\n  data is missing; pass data=…"),
    ],
)  # fmt: skip
def test_flags_become_arguments(message, expected):
    assert in_python(message, Distill) == expected


def test_an_option_is_called_what_the_function_calls_it():
    assert in_python("student is missing", Finetune) == "model is missing; pass model=…"
    assert in_python("give --model too", Finetune) == "give model=… too"

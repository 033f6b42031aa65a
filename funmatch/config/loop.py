"""Options for the student and for the training loop: length, batch, evaluation, checkpoints."""

from pathlib import Path
from typing import Annotated, Literal

from funmatch.config.metadata import Changes, Group, Inherit, OnResume, Opt, Refers
from funmatch.config.options import Machine, Options
from funmatch.config.values import Duration, Names, Pairs, Timeout, duration_problems

STUDENT, PLACE, ARITHMETIC = Changes.STUDENT, Changes.PLACE, Changes.ARITHMETIC
SAVE_SIGNALS = ("usr1", "usr2")
"""What `--save-signals` may name: signals without a meaning of their own."""


class Student(Options):
    """The network that is trained."""

    student: Annotated[
        str,
        # Without --side its own image size is that of the views.
        Opt(group=Group.STUDENT, changes=STUDENT | Changes.VIEWS, essential=True, refers=Refers.MODEL,
            content="student", replaces=("student_weights", "student_kwargs"), aliases=("--model",), metavar="MODEL"),
    ]  # fmt: skip
    """Network to train: a timm name, with random weights or, with its tag, its published ones; a folder or file with
    weights, as for a teacher; or fashion-mini-student. For another number of classes it gets a new head of zeros."""
    student_weights: Annotated[
        Path | None,
        Opt(
            group=Group.STUDENT,
            changes=STUDENT,
            inherit=Inherit.NEVER,
            refers=Refers.WEIGHTS,
            content="student",
            usual="none",
            aliases=("--weights",),
        ),
    ] = None
    """File to start from (.safetensors, .pt or BiT .npz), for a student given by its timm name."""
    student_kwargs: Annotated[
        Pairs,
        Opt(
            group=Group.STUDENT,
            changes=STUDENT,
            inherit=Inherit.NEVER,
            usual="none",
            aliases=("--model-kwargs",),
            metavar="KEY=VALUE …",
        ),
    ] = ()
    """Arguments for timm's constructor, e.g. channels=16,32,64,128. weights_key=KEY chooses among several weights in a
    file, e.g. state_dict_ema."""
    drop_rate: Annotated[
        float | None, Opt(group=Group.STUDENT, changes=STUDENT, at_least=0, below=1, usual="the network's own")
    ] = None
    """Dropout rate before the student's head (timm's drop_rate)."""
    # None, not 0: some of timm's networks have a rate of their own, Swin's is 0.1.
    drop_path: Annotated[
        float | None, Opt(group=Group.STUDENT, changes=STUDENT, at_least=0, below=1, usual="the network's own")
    ] = None
    """Stochastic-depth rate of the student (timm's drop_path_rate)."""
    # Below 1: with a decay of 1 the average would stay at the first weights.
    ema: Annotated[
        float | None,
        Opt(
            group=Group.STUDENT,
            changes=STUDENT,
            inherit=Inherit.NEVER,
            at_least=0,
            below=1,
            usual="off",
            metavar="DECAY",
        ),
    ] = None
    """Decay of the weights' exponential moving average (EMA), e.g. 0.9999; the average is evaluated and saved beside
    the student."""
    freeze_until: Annotated[
        str | None, Opt(group=Group.STUDENT, changes=STUDENT, usual="nothing is frozen", metavar="MODULE")
    ] = None
    """Freeze everything before this module of the student, e.g. stages.3 or head."""
    # Not searched: a student in fp32 and one that is rounded are no rivals.
    quantize: Annotated[
        int | None,
        Opt(
            group=Group.STUDENT,
            changes=STUDENT,
            inherit=Inherit.NEVER,
            at_least=8,
            at_most=8,
            searchable=False,
            usual="off",
            metavar="8",
        ),
    ] = None
    """Train for 8 bits: round weights and inputs of convolutions and linear layers in training and evaluation. The
    saved student is a plain one, which keeps its accuracy when it is exported with --quantize 8."""
    grad_checkpointing: Annotated[bool, Opt(group=Group.STUDENT, changes=STUDENT)] = False
    """Recompute activations in the backward pass, to need less memory. BatchNorm's running averages are updated
    twice."""


class Loop(Machine):
    """Length of the run, its batches, and what happens every so many steps."""

    # Each of steps and epochs replaces the other, so that a command line with one overrides a recipe with the other.
    steps: Annotated[
        int | None,
        Opt(group=Group.LOOP, changes=STUDENT, inherit=Inherit.NEVER, at_least=1, at_most=10**12, essential=True,
            extends=True, replaces=("epochs",), usual="by --epochs"),
    ] = None  # fmt: skip
    """Length of the run in steps (updates of the weights). Give this or --epochs."""
    epochs: Annotated[
        float | None,
        # Not compared, since the record of a run holds the number of steps instead.
        Opt(group=Group.LOOP, changes=STUDENT, inherit=Inherit.NEVER, above=0, at_most=10**9, essential=True,
            resume=OnResume.UNCOMPARED, replaces=("steps",), usual="by --steps"),
    ] = None  # fmt: skip
    """Length of the run in passes over the training images. Function matching gains from thousands."""
    # VIEWS, since all images and crops of a step are drawn for its batch as a whole.
    batch: Annotated[
        int,
        Opt(group=Group.LOOP, changes=STUDENT | Changes.VIEWS, at_least=1, at_most=10**6, essential=True,
            aliases=("-b", "--batch-size")),
    ] = 128  # fmt: skip
    """Images per step. May be more than the data set has."""
    # STUDENT, though pieces add up to the same gradient: BatchNorm normalises each piece by its own statistics.
    micro_batch: Annotated[int | None, Opt(group=Group.LOOP, changes=STUDENT, at_least=1, usual="the whole batch")] = (
        None
    )
    """Images per forward pass of the student (gradient accumulation), to need less memory. Crops and λ stay the same;
    only BatchNorm statistics change."""
    # Below 1: at 1 nothing of the label would be left.
    label_smoothing: Annotated[float, Opt(group=Group.LOOP, changes=STUDENT, at_least=0, below=1)] = 0.0
    """Share of each label that is spread over all classes, where labels are used."""
    patience: Annotated[
        int | None, Opt(group=Group.LOOP, changes=STUDENT, inherit=Inherit.NEVER, at_least=1, usual="no early stopping")
    ] = None
    """Early stopping: end the run after this many evaluations on the validation split without an improvement."""
    # last, so that the validation split selects nothing that is evaluated at the end unless somebody wants that.
    keep: Annotated[Literal["last", "best"], Opt(group=Group.LOOP, changes=STUDENT)] = "last"
    """Student to evaluate and save at the end: the last one, or the best on the validation split."""
    # A recipe or a study is the same experiment with any seed, and a search must not choose the luckiest one.
    seed: Annotated[
        int,
        Opt(group=Group.LOOP, changes=STUDENT | Changes.VIEWS, at_least=0, at_most=2**62, searchable=False,
            recipe=False, study=False),
    ] = 0  # fmt: skip
    """Seed of the student's first weights and of every random choice."""
    # FREE: as long as everything is finite no step depends on it, and a run that stopped may go on with another value.
    on_nonfinite: Annotated[
        Literal["stop", "skip", "rewind"],
        Opt(group=Group.LOOP, changes=STUDENT, searchable=False, resume=OnResume.FREE),
    ] = "stop"
    """What to do when a loss or gradient is not finite. skip: leave out the update; rewind: return to the weights of
    the newest checkpoint, and leave out the steps since then. Both cost a wait for the accelerator in every step."""
    max_nonfinite: Annotated[
        int, Opt(group=Group.LOOP, changes=STUDENT, at_least=0, searchable=False, resume=OnResume.FREE, metavar="TIMES")
    ] = 10
    """How many times steps may be left out by --on-nonfinite; the run stops after that."""
    # STUDENT: it decides at which steps --keep best and --patience look.
    eval_every: Annotated[
        int | None,
        Opt(group=Group.LOOP, changes=STUDENT, inherit=Inherit.NEVER, at_least=1, searchable=False,
            resume=OnResume.FREE, keeps=True, metavar="STEPS",
            usual="a tenth of the run, at most 500; more where the validation split is large"),
    ] = None  # fmt: skip
    """Steps between evaluations on the validation split."""
    eval_first: Annotated[
        int | None,
        Opt(group=Group.LOOP, changes=STUDENT, inherit=Inherit.NEVER, at_least=1, searchable=False,
            resume=OnResume.FREE, keeps=True, usual="2 % of the run; none with --eval-every", metavar="STEP"),
    ] = None  # fmt: skip
    """Step of an early evaluation besides those of --eval-every."""
    # PLACE, since a step is a function of (seed, step): where a run was saved changes no figure.
    save_every: Annotated[
        int | None,
        Opt(group=Group.LOOP, changes=PLACE, inherit=Inherit.NEVER, at_least=1, resume=OnResume.FREE, keeps=True,
            usual="a tenth of the run, at most 500", metavar="STEPS"),
    ] = None  # fmt: skip
    """Steps between checkpoints."""
    log_every: Annotated[
        int | None,
        Opt(group=Group.LOOP, changes=PLACE, inherit=Inherit.NEVER, at_least=1, resume=OnResume.FREE, keeps=True,
            usual="a fiftieth of the run, at most 50", metavar="STEPS"),
    ] = None  # fmt: skip
    """Steps between records of the loss."""
    time_limit: Annotated[
        Duration,
        Opt(group=Group.LOOP, changes=PLACE, inherit=Inherit.NEVER, study=False, usual="none; in a Slurm job, its end",
            aliases=("--max-time",), metavar="DURATION"),
    ] = None  # fmt: skip
    """Time from the start of the program after which the run has saved and stopped: 8h30m, 510m, 30600 (seconds) or
    1-06:00:00. The same command resumes it."""
    hang_timeout: Annotated[
        Timeout,
        Opt(group=Group.MACHINE, changes=PLACE, inherit=Inherit.NEVER, study=False, metavar="DURATION"),
    ] = "10m"
    """With several processes, end the run when one of them has not answered for so long, because it was stopped or its
    machine is gone. A process that works, for however long, answers."""
    save_signals: Annotated[
        Names,
        Opt(group=Group.LOOP, changes=PLACE, inherit=Inherit.NEVER, study=False, usual="none", metavar="SIGNAL …"),
    ] = ()  # fmt: skip
    """Signals after which the run saves and continues: usr1, usr2. Otherwise they stop it, as SIGTERM does."""
    compile: Annotated[
        Literal["auto", "off", "native", "on", "max"],
        # ROUNDING, since all of them compute the same; a run that resumes keeps what auto became.
        Opt(
            group=Group.MACHINE,
            changes=STUDENT | Changes.TEACHER | ARITHMETIC,
            inherit=Inherit.NEVER,
            resume=OnResume.ROUNDING,
        ),
    ] = "auto"
    """How to speed the networks up; results stay equal up to rounding. on: compile them, which takes a minute or two;
    max: try more kernels for longer. native: on a CPU, use funmatch's own kernels for GroupNorm and standardised
    convolutions. auto: native on a CPU; elsewhere on, for larger networks in runs of 2,000 steps or more."""
    # Another number of threads sums in another order, so a run that resumes needs the same to be bit-identical.
    threads: Annotated[
        int | None, Opt(group=Group.MACHINE, changes=ARITHMETIC, at_least=1, at_most=1024, usual="all cores")
    ] = None
    """CPU cores that the networks use. Tiny networks are faster on one."""
    # PLACE, since a batch does not depend on the thread that makes it.
    workers: Annotated[
        int | None,
        Opt(group=Group.MACHINE, changes=PLACE, at_least=1, at_most=256, resume=OnResume.FREE, aliases=("-j",),
            usual="one fewer than there are cores, at most 8"),
    ] = None  # fmt: skip
    """Threads that make views ahead of the networks."""
    device_gb: Annotated[
        float | None,
        # A run that resumes keeps the value it began with, unless another is given: its views' rounding depends on it.
        Opt(group=Group.MACHINE, changes=PLACE | Changes.VIEWS | ARITHMETIC, at_least=0, keeps=True,
            resume=OnResume.UNCOMPARED, usual="a quarter of its memory", metavar="GB"),
    ] = None  # fmt: skip
    """Most gigabytes of decoded images that an accelerator keeps in its memory, to cut views itself."""
    allow_rounding: Annotated[bool, Opt(group=Group.MACHINE, changes=PLACE, inherit=Inherit.NEVER)] = False
    """Resume although this changes results by rounding, e.g. with another value of --threads."""
    profile: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE, inherit=Inherit.NEVER)] = False
    """Profile the first steps, part by part, and save a trace of some of them in the run folder."""

    @property
    def compiles(self) -> bool:
        """Whether networks are compiled, as far as this is known without the machine."""
        return self.compile in ("on", "max")

    def problems(self) -> list[str]:
        found = []
        # Refused, not resolved by order: which of the two was meant cannot be known.
        if self.steps is not None and self.epochs is not None:
            found.append("give the length by either --steps or --epochs, not both")
        # BiT-HyperRule knows a length, but only when the images have been counted.
        if self.steps is None and self.epochs is None and not self.by_rule:
            found.append("give the length by either --steps or --epochs, e.g. --epochs 1000")
        if unknown := [name for name in self.save_signals if name.lower() not in SAVE_SIGNALS]:
            found.append(f"save_signals must be of {', '.join(SAVE_SIGNALS)}, got {', '.join(unknown)}")
        return found + self._duration_problems() + super().problems()

    def _duration_problems(self) -> list[str]:
        both = ("time_limit", "hang_timeout")
        return [problem for name in both for problem in duration_problems(name, getattr(self, name))]

"""Every knob of the program: one frozen table a verb, a sentence under each knob, checked together."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from funmatch.config import contradictions
from funmatch.config.choices import STRATEGIES, Crop
from funmatch.config.options import Options, outside

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "quadratic", "wsd", "staircase", "constant"]
Words = tuple[str, ...]

# Knobs that say where things lie or how they are shown, not what is computed: a run may change them and go on.
# The images themselves are compared by content, so it does not matter where they lie or how they are kept.
UNCOMPARED = {
    "out", "as_json", "workers", "log_every", "epochs", "data", "eval_data", "data_dir", "pixels", "resident_gb",
    "follow_links", "on_bad", "class_file", "recipe", "tape", "tape_full", "profile", "device_gb",
}  # fmt: skip


class Machine(Options):
    """How the arithmetic is done."""

    device: str = "auto"
    """Where to compute: auto, cpu, or an accelerator as torch names it (cuda, cuda:1, mps, xpu)."""
    precision: Precision = "auto"
    """Arithmetic of the networks: auto is bf16 on accelerators that have it, fp16 with loss scaling on those that do
    not; on the CPU fp32, or bf16 for a run whose student is clearly faster in it."""


class Images(Options):
    """How images are read and kept."""

    val: str | None = None
    """Cut this much of the training images off for validation: 10%, or a number of images. Which ones depends on
    their content and on --val-seed only."""
    val_seed: int = 0
    """Another seed cuts other images off."""
    unlabelled: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Forget the labels, whatever the folders are called."""
    image_feature: str | None = None
    """In shards and tables: the feature, ending or column that holds the image, by default one of the usual."""
    label_feature: str | None = None
    """In shards and tables: the feature, ending or column that holds the class; none for no labels."""
    first_label: int = 0
    """In shards: the number of the first class."""
    class_file: Path | None = None
    """In shards and tables: a file of class names, a line each."""
    follow_links: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Allow links that lead out of a folder."""
    data_dir: Path | None = None
    """Where the catalog's data sets lie, or are put; by default $FUNMATCH_DATA, or a folder in the user's cache."""
    cap: int = 512
    """Images with a longer short side are scaled down to this, in pixels."""
    decoder: Literal["auto", "pillow", "torchcodec"] = "auto"
    """What decodes JPEGs; auto is torchcodec where it is installed, else Pillow."""
    pixels: Literal["auto", "resident", "streaming"] = "auto"
    """resident: decoded once into the cache. streaming: kept encoded, and decoded a step ahead by threads. auto is
    resident up to --resident-gb."""
    resident_gb: float = 32.0
    """Up to how many gigabytes of decoded pixels auto is resident."""
    max_pixels: int = 178_956_970
    """Larger images are refused as decompression bombs."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do about images that cannot be decoded: stop and name all of them, or go on without them."""

    def problems(self) -> list[str]:
        least = {"val_seed": 0, "cap": 1, "max_pixels": 1, "resident_gb": 0}
        return outside(self, least, {"val_seed": 2**62}) + super().problems()


class Train(Images, Machine):
    """Train a model on labels alone: the honest baseline, with the views and the loop of distillation."""

    by_rule: ClassVar[bool] = False
    """Whether a rule decides the length and the staircase where nobody does."""

    data: Words
    """Images: a name (pet37, flowers102, food101, sun397, imagenet, fashion-mnist, cifar10, cifar100, fashion-mini),
    a folder, or folder:PATH, tfrecord:PATTERN, wds:PATTERN, hf:NAME. Several are joined."""
    eval_data: Words = ()
    """Other images to judge on: their validation and test splits, or all of them as a test."""
    student: str
    """The network to teach: any timm name, from scratch or, with its tag, from its published weights; a folder or file
    with weights, as for a teacher; or fashion-mini-student. Another number of classes gives a new head of zeros."""
    student_weights: Path | None = None
    """A .safetensors, .pt or BiT .npz file to start from, for a student that is a timm name."""
    out: Path
    """The run folder. The same command again goes on from its newest checkpoint."""
    recipe: str | None = None
    """A published recipe (`funmatch recipes` lists them), also as the first word: it gives every knob a value, and
    what is said beside it counts."""
    student_kwargs: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--model-kwargs"])] = ()
    """Options for timm's constructor, e.g. channels=16,32,64,128."""
    drop_rate: float | None = None
    """Share of features that the student drops before its head (timm's drop_rate)."""
    drop_path: float | None = None
    """Share of the student's blocks that are skipped in the mean (timm's drop_path_rate)."""
    ema: float | None = None
    """Also keep the average of the student's weights that forgets by this factor a step, e.g. 0.9999; it is judged and
    saved beside the student."""
    steps: int | None = None
    """Length of the run in updates. Give this or --epochs."""
    epochs: float | None = None
    """Length of the run in passes over the training images. Function matching gains from thousands."""
    batch: Annotated[int, tyro.conf.arg(aliases=["-b", "--batch-size"])] = 128
    """Images a step. May be more than there are in the data set."""
    side: Annotated[int | None, tyro.conf.arg(aliases=["--img-size"])] = None
    """Side of the views in pixels; by default the one that the student was made for."""
    eval_resize: int | None = None
    """Evaluation resizes the short side to this many pixels, then cuts the central square of --side. By default as the
    student's own card says; at another side, 32 more than --side, but at most a quarter more."""
    crop_min_area: float = 0.05
    """The smallest share of an image that a training crop covers."""
    crop: Crop | None = None
    """How an image becomes a training view: inception, a crop of any size and place, by default; mild, a random square
    of --side out of the image whose short side was resized to --resize; squash, the same out of the whole image
    resized to a square; whole, all of it, never mirrored."""
    resize: int | None = None
    """The short side's pixels before a mild crop; by default --eval-resize."""
    mixup: float | None = None
    """MixUp's λ is drawn from Beta(a, a) with this a: 1, the default, is uniform, 0 is no MixUp."""
    mixup_mode: Literal["batch", "image"] = "batch"
    """One λ (and one box of CutMix) for a whole batch, or one for each image."""
    mixup_max: bool = True
    """Take max(λ, 1 − λ), so that no image counts less than the one that it is mixed with."""
    mixup_lam: float | None = None
    """Mix with this λ at every step, in [0, 1], instead of a drawn one."""
    cutmix: float = 0.0
    """CutMix, beyond the paper: λ is drawn from Beta(a, a) with this a; 0 is off. With MixUp too, a coin decides."""
    randaugment: tuple[int, int] | None = None
    """RandAugment, beyond the paper, of the view that both see: operations on each image, and their magnitude of 30,
    e.g. 2 9."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes, where labels are used."""
    optimizer: Annotated[str, tyro.conf.arg(aliases=["--opt"])] = "adamw"
    """What turns gradients into updates: adamw, sgd, lamb, lars, muon, shampoo, soap, or any of timm's."""
    optimizer_kwargs: tuple[str, ...] = ()
    """Options for the optimizer, e.g. eps=1e-6 or, for Shampoo, block_size=128 graft_type=rmsprop."""
    momentum: float | None = None
    """Of the optimizers that have one; by default 0.9, Muon's 0.95."""
    momentum_dtype: Literal["fp32", "bf16"] = "fp32"
    """In what AdamW keeps the mean of its gradients; the paper's code takes bf16."""
    lr: float | None = None
    """The learning rate at the top of the schedule; by default 0.003."""
    schedule: Schedule = "cosine"
    """The learning rate after its linear warm-up: down to 0 by half a cosine, a line or a parabola; the same until it
    falls over the last --cooldown-steps (wsd); down by --decay-steps (staircase); or always the same."""
    cooldown_steps: int | None = None
    """Steps at the end of wsd over which the learning rate falls to 0; by default a fifth of the run."""
    cooldown_shape: Literal["sqrt", "linear"] = "sqrt"
    """How it falls: as 1 − √t, or on a line."""
    decay_steps: tuple[int, ...] = ()
    """Steps at which a staircase goes down."""
    decay_factors: tuple[float, ...] = ()
    """The learning rate after each of these steps, as a share of --lr; by default 0.1, 0.01, …"""
    weight_decay: float = 1e-4
    """Share of each kernel that a step takes away at the top of the schedule, whatever the learning rate is. (Decoupled
    and independent: torch's AdamW would call it weight_decay / lr.) Biases and norms do not decay."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises; by default 1,500, or a tenth of a run shorter than 15,000."""
    clip_norm: float | None = 1.0
    """The global norm beyond which gradients are scaled down; None for never."""
    freeze_until: str | None = None
    """The module of the network from which on it is taught, e.g. stages.3 or head; all before stays as it is."""
    micro_batch: int | None = None
    """Images that the student takes at once, to need less memory. The same crops and λ; only BatchNorm notices."""
    compile: Literal["auto", "off", "native", "on", "max"] = "auto"
    """Compile the networks, a minute or two for faster steps; max tries more kernels for longer. native: on a CPU, our
    own kernels for GroupNorm and standardised convolutions. auto: native on a CPU, elsewhere on for larger networks in
    runs of 2,000 steps or more. The same mathematics, rounded elsewhere."""
    grad_checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compute activations again on the way back, to need less memory. (BatchNorm's running averages move twice.)"""
    patience: int | None = None
    """End the run after so many evaluations on the validation split without an improvement."""
    keep: Literal["last", "best"] = "last"
    """Which student is judged and saved at the end: as it is then, or as validation liked it most."""
    seed: int = 0
    """Decides the student's first weights and every random choice of every step."""
    workers: Annotated[int | None, tyro.conf.arg(aliases=["-j"])] = None
    """Threads that make views ahead of the model; by default one less than there are cores, at most 8."""
    threads: int | None = None
    """Cores that the networks use on the CPU; by default all. Tiny networks are faster on one."""
    device_gb: float | None = None
    """Up to so many GB of decoded images an accelerator keeps and cuts views itself; by default ¼ of its memory."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say where the first steps go, part by part, and write a trace of some of them into the run folder."""
    log_every: int = 50
    """Steps between records of the loss."""
    eval_every: int = 500
    """Steps between evaluations on the validation split."""
    save_every: int = 500
    """Steps between checkpoints."""

    def problems(self) -> list[str]:
        found = outside(self, _AT_LEAST, _AT_MOST)
        if not self.data:
            found.append("give the images to learn from by --data")
        if self.val is not None and self.eval_data:
            found.append("--val cuts images for validation off --data, but --eval-data is judged on; say one of them")
        found += [
            f"{name} must be above 0, got {getattr(self, name)}" for name in _POSITIVE if not _positive(self, name)
        ]
        found += contradictions.of_length(self) + contradictions.of_schedule(self)
        found += contradictions.of_sizes(self) + contradictions.of_mixing(self)
        return found + super().problems()

    @property
    def compiles(self) -> bool:
        """Whether networks are compiled, as far as it is known."""
        return self.compile in ("on", "max")

    @property
    def cropped(self) -> Crop:
        """How images become training views."""
        return self.crop or "inception"

    @property
    def mixes(self) -> bool:
        """Whether MixUp is asked for, as far as is known without the data."""
        return self.mixup != 0


_AT_LEAST = {
    "steps": 1, "batch": 1, "side": 1, "eval_resize": 1, "warmup_steps": 0,
    "seed": 0, "workers": 1, "threads": 1, "log_every": 1, "eval_every": 1, "save_every": 1, "device_gb": 0,
    "resize": 1, "mixup": 0, "cutmix": 0, "micro_batch": 1, "patience": 1, "cooldown_steps": 0,
}  # fmt: skip
_AT_MOST = {
    "steps": 10**12, "epochs": 10**9, "batch": 10**6, "side": 10**4, "eval_resize": 10**4, "seed": 2**62,
    "workers": 256, "threads": 1024, "resize": 10**4, "mixup": 10**3, "cutmix": 10**3,
}  # fmt: skip
_POSITIVE = ("epochs", "crop_min_area", "lr", "clip_norm", "temperature")


def _positive(table: Train, name: str) -> bool:
    value = getattr(table, name, None)
    return value is None or value > 0


class Finetune(Train):
    """Teach a network with pretrained weights the labels of your images: a teacher, by BiT-HyperRule."""

    by_rule: ClassVar[bool] = True

    student: Annotated[str, tyro.conf.arg(name="model", aliases=["--student"])]
    """The network: a timm name with the tag of its weights, a BiT checkpoint, a folder, a run, or an architecture with
    --weights. Its head begins at zero, unless it already knows these very classes."""
    student_weights: Annotated[Path | None, tyro.conf.arg(name="weights", aliases=["--student-weights"])] = None
    """A .safetensors, .pt or BiT .npz file to start from, for a network that is a timm name."""
    steps: int | None = None
    """Length of the run in updates; by default 500, 10,000 or 20,000, by the number of training images."""
    epochs: float | None = None
    """Length of the run in passes over the training images, instead."""
    batch: Annotated[int, tyro.conf.arg(aliases=["-b", "--batch-size"])] = 512
    """Images a step. May be more than there are in the data set."""
    side: Annotated[int | None, tyro.conf.arg(aliases=["--img-size"])] = None
    """Side of the views in pixels; by default 128 for images of less than 96 × 96 pixels, else 480."""
    crop: Crop | None = "mild"
    """How an image becomes a training view: mild, a random square of --side out of the image whose short side was
    resized to --resize; squash, the same out of the whole image resized to a square; whole, all of it; or inception,
    a crop of any size and place."""
    resize: int | None = None
    """The short side's pixels before a mild crop; by default 160 for 128, 512 for 480, and in proportion."""
    mixup: float | None = None
    """MixUp's λ is drawn from Beta(a, a) with this a; 0 is off. By default 0.1 from 20,000 training images on."""
    optimizer: Annotated[str, tyro.conf.arg(aliases=["--opt"])] = "sgd"
    """What turns gradients into updates: sgd, adamw, lamb, lars, muon, shampoo, soap, or any of timm's."""
    lr: float | None = None
    """The learning rate at the top of the schedule; by default 0.003 a batch of 512 for SGD, 0.0001 for AdamW."""
    schedule: Schedule = "staircase"
    """The learning rate after its warm-up: down by --decay-steps; down to 0 by half a cosine, a line or a parabola; the
    same until it falls over the last --cooldown-steps (wsd); or always the same."""
    decay_steps: tuple[int, ...] = ()
    """Steps at which the staircase goes down; by default at 40, 60 and 80 % of 500 steps, 30, 60 and 90 % of more."""
    weight_decay: float = 0.0
    """Share of each kernel that a step takes away at the top of the schedule, whatever the learning rate is."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises; by default 100 for fewer than 20,000 images, else 500."""
    clip_norm: float | None = None
    """The global norm beyond which gradients are scaled down; None for never."""
    eval_every: int = 100
    """Steps between evaluations on the validation split. Where there is none, a tenth of the training images is cut
    off for it."""
    keep: Literal["last", "best"] = "best"
    """Which network is judged and saved at the end: as it is then, or as validation liked it most."""


class Teaching(Options):
    """Who teaches, and how their answers become one."""

    teacher_weights: Words = ()
    """A .safetensors, .pt or BiT .npz file for each teacher that is a timm name, `none` for one that brings its own.
    Its head decides the classes."""
    teacher_kwargs: tuple[str, ...] = ()
    """Options for the constructor of the teacher, key=value; with several, of each."""
    teacher_side: tuple[int, ...] = ()
    """Side of the teacher's views in pixels, one for all or one each; by default the student's. The same crop is
    sampled at each side."""
    teacher_share: tuple[float, ...] = ()
    """Weights of several teachers; by default all are equal."""
    combine: Literal["mean-logits", "mean-probabilities"] = "mean-logits"
    """How several teachers become one: the mean of their logits, or of their probabilities at the temperature."""
    classes: str | None = None
    """For a teacher with other classes than the images': same-names looks each class up by its name; a file
    map.json says {"our class": "the teacher's", …}, by name, number, or a list of these."""
    trust_class_order: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on although the class names of a teacher (or judged model) differ from the data's, taking both to be in the
    same order."""

    def problems(self) -> list[str]:
        found = [
            f"teacher_side must be between 1 and 10,000, got {side}"
            for side in self.teacher_side
            if not 0 < side <= 10**4
        ]
        if self.classes == "":
            found.append("classes is empty; say same-names or give a map.json")
        found += [
            f"{name} is empty" for name in ("teacher", "model", "student") if "" in _words(getattr(self, name, ()))
        ]
        found += [f"teacher_share must be above 0, got {share}" for share in self.teacher_share if not share > 0]
        teachers = len(getattr(self, "teacher", ()))
        for name, single in (("teacher_weights", 0), ("teacher_side", 1), ("teacher_share", 0)):
            given = len(getattr(self, name))
            if given and given not in (teachers, single) and teachers:
                found.append(f"{name} has {given} values for {teachers} teachers; give one each, in their order")
        return found + super().problems()


def _words(value: str | Words) -> Words:
    return (value,) if isinstance(value, str) else value


class Distill(Train, Teaching):
    """Teach a student to be the same function as a teacher. No label is used."""

    teacher: Words
    """The network to match, or several: a run folder, a timm name, hf-hub:user/model, local-dir:path, a BiT checkpoint
    path.npz or bit:R152x2_T_pet128, savedmodel:path, package.module:function, or fashion-mini-teacher."""
    teacher_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the frozen teacher: auto is the fastest that answers the first batch as fp32 does."""
    teacher_batch: int | None = None
    """Images that go through the teacher at once, to need less memory; by default all that the student sees."""
    strategy: str = "funmatch"
    """What the two see of an image. funmatch: one shared Inception crop, mixed. same/ic, same/rc: one shared Inception
    or mild random crop. ind/ic, ind/rc: each a crop of its own. fix/rs, fix/cc, fix/ic_ens: the teacher always the
    whole image, its middle, or many Inception crops of which the mean counts; the student the whole image, mild
    random or Inception crops."""
    teacher_crops: int = 1000
    """fix/ic_ens: Inception crops of each image, of which the teacher's mean probabilities are taken beforehand."""
    crop: Crop | None = None
    """The student's crop, by default as the strategy says. Those of */rc may be squash: random squares of the whole
    image resized to a square."""
    mixup: float | None = None
    """MixUp's λ is drawn from Beta(a, a) with this a: 1 is uniform, 0 is off. By default 1 for funmatch, else 0."""
    distance: Annotated[str, tyro.conf.arg(aliases=["--loss"])] = "kl"
    """Between the student's answer and the teacher's. Of probabilities at the temperature: kl, reverse-kl, js
    (Jensen–Shannon), dist (Huang et al., 2022). Of logits: l2, euclidean, log-softmax-l2, log-softmax-euclidean. hard:
    cross-entropy on the teacher's first class."""
    standardise: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Bring each image's logits to mean 0 and deviation 1 before the distance (Sun et al., 2024)."""
    label_weight: float = 0.0
    """Share of the loss that is cross-entropy on the images' labels, mixed as the views are, in [0, 1]; function
    matching uses none."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-T"])] = 1.0
    """Divides both networks' logits before the softmax."""
    t_squared: bool = True
    """Multiply the distance by the square of the temperature, so that this does not change the size of gradients."""
    teacher_ahead: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compute the teacher's answers in the threads that make views: for small networks on the CPU."""
    allow_weak_teacher: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with a teacher that is near chance on the labelled validation images."""
    tape: Path | None = None
    """A folder for what the teacher says of every view, in half precision: the first run records it, every further one
    with the same images, seed, batch, views and teacher takes it from there, at no cost of a teacher."""
    tape_top: int | None = None
    """Keep only the teacher's first so many classes on the tape, and the others as one mass."""
    tape_full: Literal["stop", "go-on"] = "stop"
    """When the disk is full in the middle of a recording: stop the run, or go on without recording."""

    @property
    def compiles(self) -> bool:
        """Whether networks are compiled, as far as it is known."""
        return self.compile in ("on", "max")

    @property
    def cropped(self) -> Crop:
        row = STRATEGIES.get(self.strategy)
        return self.crop or (row.crop if row else "inception")

    @property
    def mixes(self) -> bool:
        row = STRATEGIES.get(self.strategy)
        return self.mixup != 0 if row is None or row.mixup else bool(self.mixup)

    def problems(self) -> list[str]:
        found = [] if self.teacher else ["give the network to match by --teacher"]
        found += contradictions.of_views(self) + contradictions.of_distance(self) + contradictions.of_tape(self)
        return found + super().problems()


class Evaluate(Images, Teaching, Machine):
    """Judge a run or a model: accuracy, calibration, and closeness to a teacher."""

    model: Annotated[str, tyro.conf.Positional]
    """A run folder, or any model that `distill --teacher` takes."""
    weights: Path | None = None
    """A .safetensors, .pt or BiT .npz file for a model that is a timm name."""
    model_kwargs: tuple[str, ...] = ()
    """Options for timm's constructor, key=value."""
    data: Words = ()
    """The images; by default those of the run."""
    split: str = "auto"
    """Which split: train, val or test; auto is test, else val, else train."""
    teacher: Words = ()
    """Whom to compare with; by default the run's own teacher."""
    side: int | None = None
    """Side of the views in pixels; by default the run's or the model's own."""
    eval_resize: int | None = None
    """The short side's pixels before the central cut; by default the run's or the model's own."""
    batch: Annotated[int, tyro.conf.arg(aliases=["-b", "--batch-size"])] = 128
    """Images at a time."""

    def problems(self) -> list[str]:
        return outside(self, dict.fromkeys(("side", "eval_resize", "batch"), 1)) + super().problems()


class Named(Images):
    """Images that are named without an option."""

    data: Annotated[Words, tyro.conf.Positional, tyro.conf.arg(metavar="DATA [DATA ...]", help_behavior_hint="")]
    """Images: a name of the catalog, a folder, or folder:PATH, tfrecord:PATTERN, wds:PATTERN, hf:NAME."""

    def problems(self) -> list[str]:
        return ([] if self.data else ["give the images, e.g. ~/pictures or pet37"]) + super().problems()


class Prepare(Named):
    """Make images ready: fetch, check every file, decode once; or write them as TFRecord shards."""

    to: Literal["cache", "tfrecord"] = "cache"
    """cache: decoded for runs of this program. tfrecord: shards of tf.train.Example in --out."""
    out: Path | None = None
    """The folder for the shards."""
    side: int | None = None
    """Shards hold images resized to this square, in pixels; by default they are kept as they are."""
    shard_size: int = 128
    """Images a shard."""

    def problems(self) -> list[str]:
        found = []
        if self.to == "tfrecord" and self.out is None:
            found.append("--to tfrecord needs --out, the folder for the shards")
        if self.to == "cache" and (self.out or self.side):
            found.append("--out and --side belong to --to tfrecord")
        found += outside(self, {"side": 1, "shard_size": 1}, {"side": 16384, "shard_size": 10**6})
        return found + super().problems()


class Data(Named):
    """Show what a data set holds: counts, sizes, what is odd about it, and a sheet of samples."""

    sheet: Path | None = None
    """Where the sheet of samples goes (PNG); by default <name>-sheet.png here."""


class Report(Options):
    """Write one HTML page about one run or several: curves, figures, configuration and views."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """The page; by default report.html in the first run's folder."""
    view_step: int = 0
    """The step whose views are shown."""

    def problems(self) -> list[str]:
        found = [] if self.runs else ["give at least one run folder"]
        if not 0 <= self.view_step <= 10**12:
            found.append(f"view_step must lie between 0 and {10**12:,}, got {self.view_step}")
        return found


class Demo(Machine):
    """See it work in minutes: a small student learns from labels, then from a teacher, on embedded images."""

    steps: int = 7000
    """Updates of each of the two runs."""
    seed: int = 0
    """Decides the student's first weights and every random choice."""
    out: Path | None = None
    """Folder for the two runs and the report; by default runs/demo-<steps>-steps-seed-<seed>."""

    def problems(self) -> list[str]:
        return outside(self, {"steps": 1, "seed": 0})


class Study(Options):
    """Carry out a table of runs with several seeds, and draw what came of it: consistency, patience, or your own."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """A study that comes with the program, a file of your own (.toml), or the folder of one; by default all are
    listed."""
    out: Path | None = None
    """The study's folder; by default studies/NAME. The same command again goes on, and repeats no finished run."""
    seeds: tuple[int, ...] = ()
    """Seeds of each run; by default those of the file."""
    jobs: Annotated[int | None, tyro.conf.arg(aliases=["-j"])] = None
    """Runs at a time; by default one a core, or one where there is an accelerator."""
    only: Words = ()
    """Only the runs with these names; * and ? stand for anything."""
    set: Words = ()
    """Knobs that all runs take instead of the file's, e.g. epochs=10; with a name before a dot, that run's."""
    tapes: bool = True
    """Let distillations that show the same teacher the same views share what it says (`distill --tape`)."""
    draw: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only draw the page again, from results.jsonl."""

    def problems(self) -> list[str]:
        return outside(self, {"jobs": 1}) + [f"a seed is at least 0, got {seed}" for seed in self.seeds if seed < 0]


class Plan(Options):
    """Say what a run will take on this machine: plan, and then the words of the run."""


class Tape(Options):
    """Show a teacher tape: whose answers it holds, which steps are there, and whether every row is sound."""

    folder: Annotated[Path, tyro.conf.Positional]
    """What `distill --tape` was given."""
    recompute: int = 0
    """Let the teacher answer this many of its steps again, and compare."""

    def problems(self) -> list[str]:
        return outside(self, {"recompute": 0})


class Import(Options):
    """Turn a checkpoint (a Keras SavedModel, a BiT .npz, any model that can be named) into a folder that timm loads."""

    model: Annotated[str, tyro.conf.Positional]
    """A folder of a SavedModel, or any model that `distill --teacher` takes."""
    out: Path
    """The folder to write: model.safetensors and config.json in timm's layout."""
    weights: Path | None = None
    """A .safetensors, .pt or BiT .npz file for a model that is a timm name."""
    inputs: Literal["auto", "0..1", "-1..1", "imagenet"] = "auto"
    """The images that the network was trained on, where the checkpoint cannot say. auto: -1..1 for BiT files; for
    SavedModels as their graph rescales images (hub modules: -1..1), or 0..1 if it does not; else what timm knows."""
    side: int | None = None
    """Side of the images that it was trained on, in pixels; by default as the checkpoint's name or timm says."""
    crop_fraction: float | None = None
    """Share of the short side that its evaluation view keeps, e.g. 0.8 for 128 of 160 pixels."""
    class_file: Path | None = None
    """A file of class names, a line each."""

    def problems(self) -> list[str]:
        found = outside(self, {"side": 1}, {"side": 10**4})
        if not self.model.removeprefix("savedmodel:"):
            found.append("model is empty; name a folder of a SavedModel, or any model")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            found.append(f"crop_fraction must lie in (0, 1], got {self.crop_fraction}")
        return found


class Models(Options):
    """List the models that can be named, with parameters, arithmetic and source."""

    pattern: Annotated[str, tyro.conf.Positional] = ""
    """Part of a name, or a pattern with * and ?; by default our own names, BiT and the paper's files."""
    side: int | None = None
    """Count arithmetic for images of this side, in pixels; by default each model's own."""

    def problems(self) -> list[str]:
        return outside(self, {"side": 1}, {"side": 10**4})


class Recipes(Machine):
    """List the published recipes, or show one: its command, every knob, what was published, and the hours it takes."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """One recipe, or a pattern with * and ?; by default all."""
    measure: bool = True
    """Measure this machine for a minute at most, to estimate the hours that one recipe takes on it."""


TAUGHT: dict[str, type[Train]] = {"train": Train, "finetune": Finetune, "distill": Distill}
"""The tables of the verbs that make runs."""


class Search(Options):
    """Search knobs of a verb or a recipe (funmatch tune distill …): trials by Optuna, chosen by validation only."""

    out: Path
    """The study's folder, a run folder for each trial in it. The same command again goes on; the same command on
    another processor, or on another machine that sees the folder, helps."""
    space: Words = ()
    """What to search: lr=log:1e-5..3e-3, drop_rate=0..0.5, temperature=1,2,5,10. A recipe brings its own, of which this
    replaces the knobs that it names."""
    trials: int | None = None
    """Configurations to try; by default 20, or all of a grid."""
    executions: int = 1
    """Runs of each configuration, with the seeds --seed, --seed + 1, …; what counts is their mean."""
    sampler: Literal["random", "grid", "tpe"] = "random"
    """How configurations are chosen: at random; grid, each combination of listed values once, in random order; or TPE,
    which learns from finished trials (so with several processes it depends on who finishes when)."""
    sampler_seed: int = 0
    """Another seed chooses other configurations."""
    pruner: Literal["none", "asha", "hyperband"] = "none"
    """Whether trials that fall behind are ended early. none, since in distillation what is ahead after a short time is
    often not ahead after a long one."""
    storage: str | None = None
    """Where Optuna keeps the study: a journal file, or the URL of a database (sqlite:///study.db, postgresql+psycopg://…);
    by default journal.log in --out."""
    study_name: str | None = None
    """What the study is called in the storage; by default as the folder --out."""
    tapes: bool = True
    """Let trials share what the teacher says (`distill --tape`), where the searched knobs do not change its views."""

    def problems(self) -> list[str]:
        least = {"trials": 1, "executions": 1, "sampler_seed": 0}
        most = {"trials": 10**6, "executions": 1000, "sampler_seed": 2**62}
        found = [f"{name} is empty" for name in ("storage", "study_name") if getattr(self, name) == ""]
        return found + outside(self, least, most) + super().problems()


class SearchTrain(Search, Train):
    """Search knobs of `funmatch train`."""


class SearchFinetune(Search, Finetune):
    """Search knobs of `funmatch finetune`."""


class SearchDistill(Search, Distill):
    """Search knobs of `funmatch distill`."""


SEARCHED: dict[str, type[Search]] = {"train": SearchTrain, "finetune": SearchFinetune, "distill": SearchDistill}
"""The tables of a search among the runs of a verb."""
STILL = {
    *Images.model_fields, *Machine.model_fields, *UNCOMPARED, *Search.model_fields, "seed", "threads", "eval_every",
    "save_every", "compile", "teacher_ahead", "teacher_precision", "allow_weak_teacher", "trust_class_order",
} - {"epochs"}  # fmt: skip
"""Knobs that no search may move: they decide what is judged, or change nothing but the place and the speed."""

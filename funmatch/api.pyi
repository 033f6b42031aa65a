"""Types of `funmatch.api`. Written by `python scripts/write_stubs.py`; change the tables of `funmatch.config`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

import numpy as np
from PIL.Image import Image as Picture
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from funmatch.models.classifier import Classifier
from funmatch.reports.predictions import Prediction, Predictions
from funmatch.reports.result import Outcome as Outcome
from funmatch.reports.result import Result as Result
from funmatch.reports.result import Tuned as Tuned

Images: TypeAlias = str | Path | Sequence[str | Path]
Model: TypeAlias = str | Path | nn.Module | Result
AnyImage: TypeAlias = str | Path | Picture | np.ndarray | Tensor
Models: TypeAlias = Model | Sequence[Model]
Names: TypeAlias = str | Path | Sequence[str | Path]
KeyValues: TypeAlias = Mapping[str, Any] | str | Sequence[str]
OnEvent: TypeAlias = Callable[[str, int, dict[str, Any]], object]
Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Augment: TypeAlias = Callable[[Tensor, Generator], Tensor]
CreateOptimizer: TypeAlias = Callable[[list[nn.Parameter]], Optimizer]

class ImagesOptions(TypedDict, total=False):
    """Options for how images are read."""

    val: float | str | None
    """Hold out this much of the training images for validation: 10%, a number of images, or none. The choice depends
    only on the images' content and on val_seed. (default: the data's own split)"""
    val_seed: int
    """Seed of the validation split. (default: 0)"""
    task: Literal["multiclass", "multilabel"] | None
    """What labels mean. multiclass: one class an image. multilabel: any number of them, each with a probability of its
    own; images of the same content in several class folders have all these classes. (default: multiclass)"""
    unlabelled: bool
    """Ignore labels, whatever the folders are called."""
    image_feature: str | None
    """In shards and tables: the feature, file ending or column that holds the image, or its path. (default: one of the
    usual names)"""
    path_column: str | None
    """The same as image_feature."""
    label_feature: str | None
    """In shards and tables: the feature, file ending or column that holds the class; none for no labels. In tables of
    paths also several columns of 0 and 1, one for each class: "cat;dog". (default: one of the usual names)"""
    label_column: str | None
    """The same as label_feature."""
    split_column: str | None
    """In tables of paths: the column that says train, val or test; none for no splits. (default: one of the usual
    names)"""
    image_root: str | Path | None
    """In tables of paths: the folder that paths are relative to. (default: that of the table)"""
    label_separator: str
    """In tables of paths: what separates several labels in one cell. (default: ;)"""
    first_label: int
    """In shards and tables: the number of the first class, where classes are numbers. (default: 0)"""
    class_file: str | Path | None
    """In shards and tables: a text file with one class name per line, or its address (https://, gs://, s3://, hf://).
    (default: names in the data)"""
    follow_links: bool
    """Follow symbolic links that lead out of a folder."""
    data_dir: str | Path | None
    """Folder that holds the catalog's data sets, and into which they are downloaded. (default: $FUNMATCH_DATA, or a
    folder in the user's cache)"""
    cap: int
    """Images whose shorter side is longer than this, in pixels, are scaled down to it. (default: 512)"""
    decoder: Literal["auto", "pillow", "torchcodec"]
    """JPEG decoder; auto is torchcodec where it is installed, else Pillow. (default: auto)"""
    pixels: Literal["auto", "resident", "streaming"]
    """resident: decode once into the cache. streaming: keep images encoded and decode them a step ahead, in threads.
    auto is resident up to resident_gb. (default: auto)"""
    resident_gb: float
    """With pixels="auto": the most gigabytes of decoded pixels that are stored in the cache. (default: 32)"""
    max_pixels: int
    """Larger images are rejected as decompression bombs. Those of more than 32,000,000 pixels are decoded one at a
    time. (default: 178956970)"""
    max_scans: int
    """JPEGs of more progressive scans are rejected: each scan takes the time of a whole image. (default: 100)"""
    on_bad: Literal["stop", "skip"]
    """When images cannot be decoded: stop and list all of them, or skip them. (default: stop)"""

class TrainOptions(ImagesOptions, total=False):
    """Options of `funmatch.train`."""

    device: str
    """Device to compute on: auto, cpu, or an accelerator by PyTorch's name (cuda, cuda:1, mps, xpu). (default: auto)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Floating-point format of the networks. auto is bf16 on accelerators that support it, fp16 with loss scaling on
    others; on a CPU fp32, or bf16 where the student trains clearly faster in it. (default: auto)"""
    steps: int | None
    """Length of the run in steps (updates of the weights). Give this or epochs. (default: by epochs=…)"""
    epochs: float | None
    """Length of the run in passes over the training images. Function matching gains from thousands. (default: by
    steps=…)"""
    batch: int
    """Images per step. May be more than the data set has. (default: 128)"""
    batch_size: int
    """The same as batch."""
    micro_batch: int | None
    """Images per forward pass of the student (gradient accumulation), to need less memory. Crops and λ stay the same;
    only BatchNorm statistics change. (default: the whole batch)"""
    label_smoothing: float
    """Share of each label that is spread over all classes, where labels are used. (default: 0)"""
    patience: int | None
    """Early stopping: end the run after this many evaluations on the validation split without an improvement. (default:
    no early stopping)"""
    keep: Literal["last", "best"]
    """Student to evaluate and save at the end: the last one, or the best on the validation split. (default: last)"""
    seed: int
    """Seed of the student's first weights and of every random choice. (default: 0)"""
    on_nonfinite: Literal["stop", "skip", "rewind"]
    """What to do when a loss or gradient is not finite. skip: leave out the update; rewind: return to the weights of
    the newest checkpoint, and leave out the steps since then. Both cost a wait for the accelerator in every step.
    (default: stop)"""
    max_nonfinite: int
    """How many times steps may be left out by on_nonfinite=…; the run stops after that. (default: 10)"""
    eval_every: int | None
    """Steps between evaluations on the validation split. (default: a tenth of the run, at most 500; more where the
    validation split is large)"""
    eval_first: int | None
    """Step of an early evaluation besides those of eval_every. (default: 2 % of the run; none with eval_every)"""
    save_every: int | None
    """Steps between checkpoints. (default: a tenth of the run, at most 500)"""
    log_every: int | None
    """Steps between records of the loss. (default: a fiftieth of the run, at most 50)"""
    time_limit: float | str | None
    """Time from the start of the program after which the run has saved and stopped: 8h30m, 510m, 30600 (seconds) or
    1-06:00:00. The same command resumes it. (default: none; in a Slurm job, its end)"""
    max_time: float | str | None
    """The same as time_limit."""
    hang_timeout: float | str
    """With several processes, end the run when one of them has not answered for so long, because it was stopped or its
    machine is gone. A process that works, for however long, answers. (default: 10m)"""
    save_signals: Names
    """Signals after which the run saves and continues: usr1, usr2. Otherwise they stop it, as SIGTERM does. (default:
    none)"""
    compile: Literal["auto", "off", "native", "on", "max"]
    """How to speed the networks up; results stay equal up to rounding. on: compile them, which takes a minute or two;
    max: try more kernels for longer. native: on a CPU, use funmatch's own kernels for GroupNorm and standardised
    convolutions. auto: native on a CPU; elsewhere on, for larger networks in runs of 2,000 steps or more. (default:
    auto)"""
    threads: int | None
    """CPU cores that the networks use. Tiny networks are faster on one. (default: all cores)"""
    workers: int | None
    """Threads that make views ahead of the networks. (default: one fewer than there are cores, at most 8)"""
    device_gb: float | None
    """Most gigabytes of decoded images that an accelerator keeps in its memory, to cut views itself. (default: a
    quarter of its memory)"""
    allow_rounding: bool
    """Resume although this changes results by rounding, e.g. with another value of threads."""
    profile: bool
    """Profile the first steps, part by part, and save a trace of some of them in the run folder."""
    optimizer: str | CreateOptimizer
    """Optimizer: adamw, sgd, lamb, lars, muon, shampoo, soap, any of timm's, or package.module:function of the list of
    parameters. (default: adamw)"""
    opt: str | CreateOptimizer
    """The same as optimizer."""
    optimizer_kwargs: KeyValues
    """Arguments for the optimizer, e.g. eps=1e-6 or, for Shampoo, block_size=128 graft_type=rmsprop. (default: none)"""
    momentum: float | None
    """Momentum, or AdamW's first beta, of optimizers that have one. (default: 0.9; for muon 0.95)"""
    momentum_dtype: Literal["fp32", "bf16"]
    """Data type in which AdamW stores the mean of its gradients; the paper's code uses bf16. (default: fp32)"""
    lr: float | None
    """Learning rate at the top of the schedule. (default: 0.003)"""
    schedule: Literal["cosine", "linear", "quadratic", "wsd", "staircase", "constant"]
    """Learning rate after the linear warm-up: falling to 0 along half a cosine, a line or a parabola; constant until it
    falls over the last cooldown_steps (wsd); falling at decay_steps (staircase); or constant. (default: cosine)"""
    cooldown_steps: int | None
    """wsd: number of steps at the end of the run over which the learning rate falls to 0. (default: a fifth of the
    run)"""
    cooldown_shape: Literal["sqrt", "linear"]
    """wsd: how it falls, as 1 − √t or along a line. (default: sqrt)"""
    decay_steps: int | Sequence[int]
    """staircase: the steps at which the learning rate falls. (default: none)"""
    decay_factors: float | Sequence[float]
    """staircase: the learning rate after each of these steps, as a share of lr. (default: 0.1, 0.01, …)"""
    weight_decay: float
    """Weight decay, decoupled from the learning rate: the share of each kernel that one step removes at the top of the
    schedule. (In torch's AdamW this would be weight_decay / lr.) Biases and norm layers do not decay. (default:
    0.0001)"""
    warmup_steps: int | None
    """Number of steps over which the learning rate rises from 0. (default: 1,500, but at most 1/10 of the run)"""
    clip_norm: float | None
    """Clip gradients to this global norm; None never clips. (default: 1)"""
    side: int | None
    """Image size: side of the square views, in pixels. (default: the student's own)"""
    img_size: int | None
    """The same as side."""
    eval_resize: int | None
    """For evaluation, resize the shorter side to this many pixels, then crop the central square of side. (default: the
    student's own; at another side, 32 more than it, at most a quarter more)"""
    crop_min_area: float
    """Smallest share of an image's area that an Inception crop covers. (default: 0.05)"""
    crop_ratio: Sequence[float]
    """Bounds of width / height of an Inception crop. TensorFlow's own end at 1.33, those of torchvision at 4/3.
    (default: 0.75 1.33333)"""
    ratio: Sequence[float]
    """The same as crop_ratio."""
    crop: Literal["inception", "mild", "squash", "whole"] | None
    """How an image becomes a training view. inception: a crop of random size and place. mild: a random square of side,
    after resizing the shorter side to resize. squash: the same, after resizing the whole image to a square. whole: all
    of the image, never mirrored. (default: inception)"""
    resize: int | None
    """Length of the image's shorter side before a mild crop, in pixels. (default: eval_resize)"""
    resample: Literal["antialias", "bicubic", "area", "tf"] | None
    """How training views are resized. tf: bilinear without antialias, as tf.image.resize and the paper's code.
    antialias: bilinear with antialias. bicubic: with antialias, too. area: the mean of each pixel's area. (default:
    tf)"""
    eval_resample: (
        Literal[
            "antialias",
            "bicubic",
            "area",
            "tf",
            "nearest",
            "lanczos",
            "box",
            "hamming",
            "torchvision-nearest",
            "torchvision-bilinear",
            "torchvision-bicubic",
            "torchvision-lanczos",
        ]
        | None
    )
    """How images are resized for evaluation. With antialias (bilinear), bicubic, nearest, lanczos, box and hamming,
    timm's own transform gives the same figures; with area, the paper's code; with torchvision's own filters, that of
    transformers. (default: antialias)"""
    mixup: float | None
    """MixUp: draw λ from Beta(a, a) with this a. 1 is uniform, 0 turns MixUp off. (default: 1)"""
    mixup_mode: Literal["batch", "image"]
    """Draw one λ (and one CutMix box) per batch, or one per image. (default: batch)"""
    mixup_max: bool
    """Use max(λ, 1 − λ), so that no image weighs less than the one it is mixed with. (default: on)"""
    mixup_lam: float | None
    """Fixed λ of MixUp, in [0, 1]: the share of the image itself. (default: drawn at every step)"""
    cutmix: float
    """CutMix (not in the paper): draw λ from Beta(a, a) with this a; 0 is off. With MixUp, one of the two is chosen at
    random per batch. (default: 0)"""
    randaugment: Sequence[int] | None
    """RandAugment (not in the paper) of the shared view: operations per image, and their magnitude from 0 to 30, e.g. 2
    9. (default: off)"""
    augment: str | Augment | None
    """Augmentation of your own: package.module:function of the crops, (n, 3, side, side) in [0, 1], and a
    torch.Generator, that gives crops of the same shape. It is applied before MixUp to the crops of student and teacher.
    (default: none)"""
    policy: Names
    """View policies, of which each image of a batch draws one: some of mixup, mixup_lam, cutmix, randaugment, crop,
    crop_min_area and crop_ratio, which replace the run's for it, e.g. "mixup=1" "mixup=0,randaugment=2 9". (default:
    one for all images)"""
    policy_share: float | Sequence[float]
    """Shares of the policies in the images, one each, e.g. 2 1. (default: equal)"""
    student_weights: str | Path | None
    """File to start from (.safetensors, .pt or BiT .npz), for a student given by its timm name. (default: none)"""
    weights: str | Path | None
    """The same as student_weights."""
    student_kwargs: KeyValues
    """Arguments for timm's constructor, e.g. channels=16,32,64,128. weights_key=KEY chooses among several weights in a
    file, e.g. state_dict_ema. (default: none)"""
    model_kwargs: KeyValues
    """The same as student_kwargs."""
    drop_rate: float | None
    """Dropout rate before the student's head (timm's drop_rate). (default: the network's own)"""
    drop_path: float | None
    """Stochastic-depth rate of the student (timm's drop_path_rate). (default: the network's own)"""
    ema: float | None
    """Decay of the weights' exponential moving average (EMA), e.g. 0.9999; the average is evaluated and saved beside
    the student. (default: off)"""
    freeze_until: str | None
    """Freeze everything before this module of the student, e.g. stages.3 or head. (default: nothing is frozen)"""
    quantize: int | None
    """Train for 8 bits: round weights and inputs of convolutions and linear layers in training and evaluation. The
    saved student is a plain one, which keeps its accuracy when it is exported with quantize=8. (default: off)"""
    grad_checkpointing: bool
    """Recompute activations in the backward pass, to need less memory. BatchNorm's running averages are updated
    twice."""
    val: float | str | None
    """Hold out this much of the training images for validation: 10%, or a number of images; none trains on all of them.
    The choice depends only on the images' content and on val_seed. (default: the data's own split, or 10% where it has
    none)"""
    share: float | Sequence[float]
    """Shares of the sources of data in each batch, one each, e.g. 2 1: each source has epochs of its own, in which each
    of its images comes once. (default: by their numbers of images)"""
    eval_data: Names
    """Other images to evaluate on: their validation and test splits, or all of them as a test split. (default: those of
    data)"""
    sampling: Literal["shuffled", "balanced"]
    """Order of the training images. shuffled: each once an epoch. balanced: all classes equally often, the images of a
    class each once before any comes again; for train and finetune. (default: shuffled)"""
    class_weights: Literal["none", "balanced"]
    """Weights of the classes in the loss. balanced: inversely proportional to their numbers of training images, 1 in
    the mean over the images; with task="multilabel", an image with a class weighs as many times as there are training
    images without it for each with it; for train and finetune. (default: none)"""
    dry_run: bool
    """Print the options as they would be used, where each value comes from, the images, the parameters and the length;
    train nothing and write no run folder."""

class FinetuneOptions(TrainOptions, total=False):
    """Options of `funmatch.finetune`."""

    steps: int | None
    """Length of the run in steps (updates of the weights). (default: 500, 10,000 or 20,000, by the number of training
    images)"""
    epochs: float | None
    """Length of the run in passes over the training images, instead of steps. (default: by steps=…)"""
    batch: int
    """Images per step. May be more than the data set has. (default: 512)"""
    keep: Literal["last", "best"]
    """Network to evaluate and save at the end: the last one, or the best on the validation split. (default: best)"""
    eval_every: int | None
    """Steps between evaluations on the validation split. Where there is none, a tenth of the training images is held
    out for it. (default: a tenth of the run, at most 100; more where the validation split is large)"""
    optimizer: str | CreateOptimizer
    """Optimizer: sgd, adamw, lamb, lars, muon, shampoo, soap, or any of timm's. (default: sgd)"""
    lr: float | None
    """Learning rate at the top of the schedule. (default: 0.003 × batch / 512 for sgd, 0.0001 for others)"""
    schedule: Literal["cosine", "linear", "quadratic", "wsd", "staircase", "constant"]
    """Learning rate after the warm-up: falling at decay_steps (staircase); falling to 0 along half a cosine, a line or
    a parabola; constant until it falls over the last cooldown_steps (wsd); or constant. (default: staircase)"""
    decay_steps: int | Sequence[int]
    """staircase: the steps at which the learning rate falls. (default: at 40, 60 and 80 % of 500 steps, at 30, 60 and
    90 % of more)"""
    weight_decay: float
    """Weight decay, decoupled from the learning rate: the share of each kernel that one step removes at the top of the
    schedule. (default: 0)"""
    warmup_steps: int | None
    """Number of steps over which the learning rate rises from 0. (default: 100 for fewer than 20,000 training images,
    else 500)"""
    clip_norm: float | None
    """Clip gradients to this global norm; None never clips. (default: never)"""
    side: int | None
    """Image size: side of the square views, in pixels. (default: 128 for images of fewer than 96 × 96 pixels, else
    480)"""
    crop: Literal["inception", "mild", "squash", "whole"] | None
    """How an image becomes a training view. mild: a random square of side, after resizing the shorter side to resize.
    squash: the same, after resizing the whole image to a square. whole: all of the image. inception: a crop of random
    size and place. (default: mild)"""
    resize: int | None
    """Length of the image's shorter side before a mild crop, in pixels. (default: 160 for side=128, 512 for 480, and in
    proportion)"""
    mixup: float | None
    """MixUp: draw λ from Beta(a, a) with this a; 0 turns MixUp off. (default: 0.1 from 20,000 training images on, else
    0)"""
    weights: str | Path | None
    """File to start from (.safetensors, .pt or BiT .npz), for a network given by its timm name. (default: none)"""
    student_weights: str | Path | None
    """The same as weights."""

class DistillOptions(TrainOptions, total=False):
    """Options of `funmatch.distill`."""

    match: Names
    """What the student matches: logits; features, those before the head, for which the teacher needs no head, and of
    which alone the student becomes a backbone without classes; tokens, beside features, the map before pooling.
    (default: logits)"""
    match_weights: float | Sequence[float]
    """Weights of what match lists, in its order; the losses are added up. (default: 1 each)"""
    feature_loss: Literal["cosine", "l2", "queue-kl", "batch-kl"]
    """Distances between features, projected to the teacher's width. cosine, l2: of each image. queue-kl: KL of its
    similarities to the teacher's features of earlier batches (SEED). batch-kl: of those to the other images of its
    batch, as each network sees them. Several are added up; tokens use cosine and l2. (default: cosine)"""
    feature_loss_weights: float | Sequence[float]
    """Weights of what feature_loss lists, in its order. (default: 1 each)"""
    feature_queue: int
    """queue-kl: images in the queue, rounded up to whole batches. (default: 4096)"""
    feature_temperature: float
    """queue-kl and batch-kl: temperature of the similarities. (default: 0.07)"""
    standardise_features: Literal["auto", "on", "off"]
    """Standardise the teacher's features, each dimension to mean 0 and deviation 1 by the first batches; auto: where
    there are several teachers. (default: auto)"""
    classes_from: Literal["FILE", "data"] | None
    """For networks of image and text (clip:MODEL), the classes that they tell apart: a text file with a name a line; a
    JSON file with a list of names, or {"name": ["description", …], …}; or data, the data's own class names. Underscores
    are read as spaces. (default: none)"""
    templates: Literal["openai-80", "short", "none", "FILE"] | None
    """Sentences in which a class name is put, whose embeddings are averaged: the 80 that are usual for ImageNet, the 7
    of them that do best together, none, or a text file with one a line, {} where the name stands. (default: openai-80;
    none for descriptions)"""
    teacher_weights: Names
    """File with the weights (.safetensors, .pt or BiT .npz) of each teacher given by its timm name; `none` for one that
    brings its own. Its head decides the classes. (default: none)"""
    teacher_kwargs: KeyValues
    """Arguments for the teacher's constructor; with several teachers, for each of them. weights_key=KEY chooses among
    several weights in a file, e.g. state_dict_ema. (default: none)"""
    teacher_side: int | Sequence[int]
    """Image size of the teacher's views in pixels, one for all teachers or one each. The same crop is sampled at each
    size. (default: the student's)"""
    teacher_share: float | Sequence[float]
    """Weights of several teachers in their mean, one each. (default: equal)"""
    combine: Literal["mean-logits", "mean-probabilities"]
    """How several teachers become one: the mean of their logits, or of their probabilities at the temperature.
    (default: mean-logits)"""
    classes: str | None
    """For a teacher with other classes than the data: same-names matches classes by name; by-number sorts classes that
    are numbers by value, 2 before 10; a file map.json holds {"our class": "the teacher's", …}, by name, by number, or a
    list of these. (default: the teacher's classes)"""
    trust_class_order: bool
    """Continue although the class names of a teacher (or of the evaluated model) differ from the data's, or are numbers
    that it seems to have in another order, assuming the same order."""
    crop: Literal["inception", "mild", "squash", "whole"] | None
    """The student's crop. Strategies with mild crops (*/rc, fix/cc) also take squash: random squares of the whole image
    resized to a square. (default: the strategy's)"""
    mixup: float | None
    """MixUp: draw λ from Beta(a, a) with this a. 1 is uniform, 0 turns MixUp off. (default: 1 for funmatch, else 0)"""
    teacher_precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Floating-point format of the frozen teacher; auto is the fastest whose outputs for the first views equal those in
    fp32. (default: auto)"""
    teacher_batch: int | None
    """Images per forward pass of the teacher, to need less memory. (default: as many as the student)"""
    strategy: Literal["funmatch", "same/ic", "same/rc", "ind/ic", "ind/rc", "fix/ic_ens", "fix/cc", "fix/rs"]
    """Views of teacher and student. funmatch: one shared Inception crop, mixed. same/ic, same/rc: one shared Inception
    or mild random crop. ind/ic, ind/rc: independent crops. fix/rs, fix/cc, fix/ic_ens: the teacher always gets the
    whole image, its centre, or many Inception crops, whose mean output counts; the student gets the whole image, mild
    random or Inception crops. (default: funmatch)"""
    teacher_crops: int
    """fix/ic_ens: Inception crops of each image over which the teacher's probabilities are averaged beforehand.
    (default: 1000)"""
    distance: (
        Literal["kl", "reverse-kl", "js", "dist", "hard", "l2", "euclidean", "log-softmax-l2", "log-softmax-euclidean"]
        | Distance
    )
    """Loss between the outputs of student and teacher. Of probabilities at the temperature: kl, reverse-kl, js
    (Jensen–Shannon), dist (Huang et al., 2022). Of logits: l2, euclidean, log-softmax-l2, log-softmax-euclidean. hard:
    cross-entropy on the teacher's top class. Or package.module:function of both logits, (n, classes) each, that gives
    one number an image. (default: kl)"""
    loss: (
        Literal["kl", "reverse-kl", "js", "dist", "hard", "l2", "euclidean", "log-softmax-l2", "log-softmax-euclidean"]
        | Distance
    )
    """The same as distance."""
    standardise: bool
    """Standardise each image's logits to mean 0 and deviation 1 before the distance (Sun et al., 2024)."""
    label_weight: float
    """Share of the loss that is cross-entropy on the images' labels, mixed as the views are; function matching uses
    none. (default: 0)"""
    temperature: float
    """Temperature: both networks' logits are divided by it before the softmax. (default: 1)"""
    t_squared: bool
    """Multiply the distance by the square of the temperature, so that the temperature does not scale gradients.
    (default: on)"""
    teacher_ahead: bool
    """Run the teacher in the threads that make views: faster for small networks on a CPU."""
    allow_weak_teacher: bool
    """Continue with a teacher that is near chance on the labelled validation images."""
    tape: str | Path | None
    """Folder for a tape: the teacher's logits for every view, in half precision. The first run records it; later runs
    with the same images, seed, batch, views and teacher read it instead of running the teacher. (default: none)"""
    tape_top: int | None
    """Store only the teacher's top K classes on the tape, and the mass of all others as one number. (default: all)"""
    tape_full: Literal["stop", "go-on"]
    """When the disk becomes full while a tape is recorded: stop the run, or continue without recording. (default:
    stop)"""

class RecipeOptions(DistillOptions, total=False):
    """Options of `funmatch.recipe`."""

    student: Model
    """Network to train: a timm name, with random weights or, with its tag, its published ones; a folder or file with
    weights, as for a teacher; or fashion-mini-student. For another number of classes it gets a new head of zeros. Give
    student=… several times to train several students in one process."""
    model: Model
    """The same as student."""
    data: Names
    """Training images: a name (pet37, flowers102, food101, sun397, imagenet, fashion-mnist, cifar10, cifar100,
    fashion-mini), a folder, or a source with its prefix, e.g. tfrecord:PATTERN, wds:PATTERN, hf:NAME, csv:FILE; or any
    of these at an address (gs://, s3://, hf://, https://). Several are joined."""
    teacher: Models
    """Network to match, or several: a run folder, a timm name, hf-hub:user/model or the folder of a model (of timm or
    transformers), a BiT checkpoint path.npz or bit:R152x2_T_pet128, savedmodel:path, path.keras, clip:MODEL,
    package.module:function, or fashion-mini-teacher."""
    out: str | Path
    """Run folder. The same command again resumes from its newest checkpoint."""
    config: str | Path | None
    """File of options: .toml (`funmatch config` writes a template), .yaml, or the config.json of a run. Options on the
    command line override it; paths in it are relative to the current folder. (default: none)"""

class TuneOptions(DistillOptions, total=False):
    """Options of `funmatch.tune`."""

    trials: int | None
    """Number of configurations to try. (default: 20, or all of a grid)"""
    executions: int
    """Runs of each configuration, with the seeds seed, seed + 1, …; their mean counts. (default: 1)"""
    sampler: Literal["random", "grid", "tpe"]
    """How configurations are chosen. random. grid: every combination of listed values once, in random order. tpe: learn
    from finished trials (with several processes, the order in which they finish then matters). (default: random)"""
    sampler_seed: int
    """Seed of the sampler. (default: 0)"""
    pruner: Literal["none", "asha", "hyperband"]
    """Whether trials that fall behind are stopped early. In distillation the leader after a short time is often not the
    leader after a long one, so none is the default. (default: none)"""
    storage: Literal["PATH", "URL"] | None
    """Where Optuna stores the search: a journal file, or the URL of a database (sqlite:///study.db,
    postgresql+psycopg://…). (default: journal.log in out)"""
    study_name: str | None
    """Name of the search in the storage. (default: the name of the folder out)"""
    tapes: bool
    """Let trials share the teacher's logits (`distill --tape`), where the searched options do not change its views.
    (default: on)"""
    student: Model
    """Network to train: a timm name, with random weights or, with its tag, its published ones; a folder or file with
    weights, as for a teacher; or fashion-mini-student. For another number of classes it gets a new head of zeros. Give
    student=… several times to train several students in one process."""
    model: Model
    """The same as student."""
    data: Names
    """Training images: a name (pet37, flowers102, food101, sun397, imagenet, fashion-mnist, cifar10, cifar100,
    fashion-mini), a folder, or a source with its prefix, e.g. tfrecord:PATTERN, wds:PATTERN, hf:NAME, csv:FILE; or any
    of these at an address (gs://, s3://, hf://, https://). Several are joined."""
    teacher: Models
    """Network to match, or several: a run folder, a timm name, hf-hub:user/model or the folder of a model (of timm or
    transformers), a BiT checkpoint path.npz or bit:R152x2_T_pet128, savedmodel:path, path.keras, clip:MODEL,
    package.module:function, or fashion-mini-teacher."""
    config: str | Path | None
    """File of options: .toml (`funmatch config` writes a template), .yaml, or the config.json of a run. Options on the
    command line override it; paths in it are relative to the current folder. (default: none)"""
    recipe: str | None
    """Published recipe (`funmatch recipes` lists them), also given as the first word: it sets every option; options on
    the command line override it. (default: none)"""

class PrepareOptions(ImagesOptions, total=False):
    """Options of `funmatch.prepare`."""

    to: Literal["cache", "tfrecord"]
    """cache: decode for the runs of this program. tfrecord: write shards of tf.train.Example into out. (default:
    cache)"""
    out: str | Path | None
    """Folder for the shards. (default: none)"""
    side: int | None
    """Resize the images of the shards to this many pixels a side: to a square, unless fit="keep". (default: each
    image's own size)"""
    img_size: int | None
    """The same as side."""
    fit: Literal["squash", "keep"]
    """How side treats the aspect. squash: make every image a square, as the earlier TensorFlow project did with 384.
    keep: make the shorter side that long and keep the aspect. (default: squash)"""
    resample: Literal["antialias", "bicubic", "tf"]
    """How side resizes. antialias: bilinear with antialias, as Pillow. bicubic: bicubic with antialias. tf: bilinear
    without antialias, as tf.image.resize and so the earlier TensorFlow project. (default: antialias)"""
    shard_size: int
    """Images per shard. (default: 128)"""

class EvaluateOptions(ImagesOptions, total=False):
    """Options of `funmatch.evaluate`."""

    device: str
    """Device to compute on: auto, cpu, or an accelerator by PyTorch's name (cuda, cuda:1, mps, xpu). (default: auto)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Floating-point format of the networks. auto is bf16 on accelerators that support it, fp16 with loss scaling on
    others; on a CPU fp32, or bf16 where the student trains clearly faster in it. (default: auto)"""
    classes_from: Literal["FILE", "data"] | None
    """For networks of image and text (clip:MODEL), the classes that they tell apart: a text file with a name a line; a
    JSON file with a list of names, or {"name": ["description", …], …}; or data, the data's own class names. Underscores
    are read as spaces. (default: none)"""
    templates: Literal["openai-80", "short", "none", "FILE"] | None
    """Sentences in which a class name is put, whose embeddings are averaged: the 80 that are usual for ImageNet, the 7
    of them that do best together, none, or a text file with one a line, {} where the name stands. (default: openai-80;
    none for descriptions)"""
    weights: str | Path | None
    """File with weights (.safetensors, .pt or BiT .npz), for a model given by its timm name. (default: none)"""
    model_kwargs: KeyValues
    """Arguments for timm's constructor. weights_key=KEY chooses among several weights in a file, e.g. state_dict_ema.
    (default: none)"""
    side: int | None
    """Image size: side of the square views, in pixels. (default: the run's or the model's own)"""
    img_size: int | None
    """The same as side."""
    eval_resize: int | None
    """Length of the image's shorter side before the central crop, in pixels. (default: the run's or the model's own)"""
    eval_resample: (
        Literal[
            "antialias",
            "bicubic",
            "area",
            "tf",
            "nearest",
            "lanczos",
            "box",
            "hamming",
            "torchvision-nearest",
            "torchvision-bilinear",
            "torchvision-bicubic",
            "torchvision-lanczos",
        ]
        | None
    )
    """How images are resized: antialias (bilinear), bicubic, area, tf (bilinear without antialias), nearest, lanczos,
    box, hamming, or a filter of torchvision's own code. (default: the run's or the model's own)"""
    batch: int
    """Images per forward pass. (default: 128)"""
    batch_size: int
    """The same as batch."""
    task: Literal["multiclass", "multilabel"] | None
    """What labels mean. multiclass: one class an image. multilabel: any number of them, each with a probability of its
    own. (default: the model's)"""
    data: Names
    """Images: a name of the catalog, a folder, or a source with its prefix, e.g. tfrecord:PATTERN, wds:PATTERN,
    hf:NAME, csv:FILE; or any of these at an address (gs://, s3://, hf://, https://). Several are joined. (default: the
    run's)"""
    teacher_weights: Names
    """File with the weights (.safetensors, .pt or BiT .npz) of each teacher given by its timm name; `none` for one that
    brings its own. Its head decides the classes. (default: none)"""
    teacher_kwargs: KeyValues
    """Arguments for the teacher's constructor; with several teachers, for each of them. weights_key=KEY chooses among
    several weights in a file, e.g. state_dict_ema. (default: none)"""
    teacher_side: int | Sequence[int]
    """Image size of the teacher's views in pixels, one for all teachers or one each. The same crop is sampled at each
    size. (default: the student's)"""
    teacher_share: float | Sequence[float]
    """Weights of several teachers in their mean, one each. (default: equal)"""
    combine: Literal["mean-logits", "mean-probabilities"]
    """How several teachers become one: the mean of their logits, or of their probabilities at the temperature.
    (default: mean-logits)"""
    classes: str | None
    """For a teacher with other classes than the data: same-names matches classes by name; by-number sorts classes that
    are numbers by value, 2 before 10; a file map.json holds {"our class": "the teacher's", …}, by name, by number, or a
    list of these. (default: the teacher's classes)"""
    trust_class_order: bool
    """Continue although the class names of a teacher (or of the evaluated model) differ from the data's, or are numbers
    that it seems to have in another order, assuming the same order."""
    others: Models
    """More models, each compared with the first on the same images. (default: none)"""
    split: Literal["auto", "train", "val", "test"]
    """Split to evaluate on; auto is test, else val, else train. (default: auto)"""
    teacher: Models
    """Teacher to compare with, or several, as `distill --teacher` takes them. (default: the run's)"""
    tta: Literal["none", "flip"]
    """Test-time augmentation: flip averages the logits of each image and its mirror image, also the teacher's.
    (default: none)"""
    corruptions: Names
    """Evaluate on corrupted images, too, at severities 1 to 5: all, or some of noise, blur, brightness, darkness,
    contrast, saturation, jpeg, solarize, posterize, elastic, pixelate. (default: none)"""
    corruption_images: int
    """Images that are corrupted, at most; they are spread evenly over the split. (default: 2000)"""
    embedding: bool
    """Measure the model's features, too: nearest neighbours and a linear probe, from the training images to the
    evaluated ones. Models without classes (num_classes=0) are measured by these alone."""
    seed: int
    """Seed of the corruptions and of the bootstrap intervals. (default: 0)"""
    per_image: str | Path | None
    """CSV file for a line per image: its name, label, predicted class, probability, and the teacher's. (default:
    none)"""
    report: str | Path | None
    """HTML page with plots, the metrics of each class, and the images on which model and teacher differ most; none for
    no page. Models that are no runs, and several models, have a page only where this names one. (default:
    evaluation.html in the run's folder)"""
    overwrite: bool
    """Replace the files of per_image and report if they exist."""

class HeadOptions(ImagesOptions, total=False):
    """Options of `funmatch.head`."""

    device: str
    """Device to compute on: auto, cpu, or an accelerator by PyTorch's name (cuda, cuda:1, mps, xpu). (default: auto)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Floating-point format of the networks. auto is bf16 on accelerators that support it, fp16 with loss scaling on
    others; on a CPU fp32, or bf16 where the student trains clearly faster in it. (default: auto)"""
    classes_from: Literal["FILE", "data"] | None
    """For a network of image and text (clip:MODEL), the classes that it tells apart: a text file with a name a line; a
    JSON file with a list of names, or {"name": ["description", …], …}; or data, the class names of the images that it
    is evaluated on. Without it, its outputs are embeddings. (default: none)"""
    templates: Literal["openai-80", "short", "none", "FILE"] | None
    """Sentences in which a class name is put: openai-80, short, none, or a text file with one a line, {} where the name
    stands. (default: openai-80; none for descriptions)"""
    weights: str | Path | None
    """File with weights (.safetensors, .pt or BiT .npz), for a model given by its timm name. (default: none)"""
    model_kwargs: KeyValues
    """Arguments for timm's constructor. weights_key=KEY chooses among several weights in a file, e.g. state_dict_ema.
    (default: none)"""
    side: int | None
    """Image size: side of the square views, in pixels. (default: the run's or the model's own)"""
    img_size: int | None
    """The same as side."""
    eval_resize: int | None
    """Length of the image's shorter side before the central crop, in pixels. (default: the run's or the model's own)"""
    eval_resample: (
        Literal[
            "antialias",
            "bicubic",
            "area",
            "tf",
            "nearest",
            "lanczos",
            "box",
            "hamming",
            "torchvision-nearest",
            "torchvision-bilinear",
            "torchvision-bicubic",
            "torchvision-lanczos",
        ]
        | None
    )
    """How images are resized: antialias (bilinear), bicubic, area, tf (bilinear without antialias), nearest, lanczos,
    box, hamming, or a filter of torchvision's own code. (default: the run's or the model's own)"""
    batch: int
    """Images per forward pass. (default: 128)"""
    batch_size: int
    """The same as batch."""
    val: float | str | None
    """Hold out this much of the training images, to choose by: 10%, or a number of images; none takes the one strength
    that is given. The choice depends only on the images' content and on val_seed. (default: the data's own split, or
    10% where it has none)"""
    kind: Literal["linear", "knn", "means"]
    """Head to fit. linear: logistic regression, multinomial, or binary for each class with task="multilabel". knn: the
    weighted vote of the nearest training images, which become a part of the network. means: the nearest mean of a
    class, or with task="multilabel", for each class, of the images with and without it. (default: linear)"""
    C: float | Sequence[float]
    """Strengths of linear's L2 penalty to try, as scikit-learn's C: the smaller, the stronger. The best on the
    validation images is taken: of those within a standard error of the best accuracy, that of least log loss; with
    task="multilabel" that of the best mean average precision. (default: 15 from 1e-5 to 100)"""
    strengths: float | Sequence[float]
    """The same as C."""
    standardise: bool
    """Fit linear to features with mean 0 and deviation 1, as scikit-learn's StandardScaler makes them. The weights that
    are saved are for the features as they are. (default: on)"""
    class_weights: Literal["none", "balanced"]
    """Weights of the classes in linear's loss. balanced: inversely proportional to their numbers of training images;
    with task="multilabel", an image with a class weighs as many times as there are without it for each with it.
    (default: none)"""
    calibrate: bool
    """Scale the logits so that the log loss on the validation images is least, which changes no predicted class.
    (default: on)"""
    neighbours: int | Sequence[int]
    """Numbers of knn's neighbours to try. (default: 1 5 10 20 50 100 200)"""
    distance: Literal["cosine", "euclidean"]
    """By what the means are near. (default: cosine)"""

class ExportOptions(ImagesOptions, total=False):
    """Options of `funmatch.export`."""

    device: str
    """Device to compute on: auto, cpu, or an accelerator by PyTorch's name (cuda, cuda:1, mps, xpu). (default: auto)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Floating-point format of the networks. auto is bf16 on accelerators that support it, fp16 with loss scaling on
    others; on a CPU fp32, or bf16 where the student trains clearly faster in it. (default: auto)"""
    classes_from: Literal["FILE", "data"] | None
    """For a network of image and text (clip:MODEL), the classes that it tells apart: a text file with a name a line; a
    JSON file with a list of names, or {"name": ["description", …], …}; or data, the class names of the images that it
    is evaluated on. Without it, its outputs are embeddings. (default: none)"""
    templates: Literal["openai-80", "short", "none", "FILE"] | None
    """Sentences in which a class name is put: openai-80, short, none, or a text file with one a line, {} where the name
    stands. (default: openai-80; none for descriptions)"""
    weights: str | Path | None
    """File with weights (.safetensors, .pt or BiT .npz), for a model given by its timm name. (default: none)"""
    model_kwargs: KeyValues
    """Arguments for timm's constructor. weights_key=KEY chooses among several weights in a file, e.g. state_dict_ema.
    (default: none)"""
    side: int | None
    """Image size: side of the square views, in pixels. (default: the run's or the model's own)"""
    img_size: int | None
    """The same as side."""
    eval_resize: int | None
    """Length of the image's shorter side before the central crop, in pixels. (default: the run's or the model's own)"""
    eval_resample: (
        Literal[
            "antialias",
            "bicubic",
            "area",
            "tf",
            "nearest",
            "lanczos",
            "box",
            "hamming",
            "torchvision-nearest",
            "torchvision-bilinear",
            "torchvision-bicubic",
            "torchvision-lanczos",
        ]
        | None
    )
    """How images are resized: antialias (bilinear), bicubic, area, tf (bilinear without antialias), nearest, lanczos,
    box, hamming, or a filter of torchvision's own code. (default: the run's or the model's own)"""
    batch: int
    """Images per forward pass. (default: 128)"""
    batch_size: int
    """The same as batch."""
    task: Literal["multiclass", "multilabel"] | None
    """What labels mean. multiclass: one class an image. multilabel: any number of them, each with a probability of its
    own. (default: the model's)"""
    data: Names
    """Images: a name of the catalog, a folder, or a source with its prefix, e.g. tfrecord:PATTERN, wds:PATTERN,
    hf:NAME, csv:FILE; or any of these at an address (gs://, s3://, hf://, https://). Several are joined. (default: the
    run's)"""
    format: Literal["onnx", "torch-export", "openvino", "timm", "keras …"]
    """Formats to write, one or several: onnx, torch-export (.pt2), openvino (.xml), timm; of BiT networks also keras
    (.keras), savedmodel, tflite. (default: onnx)"""
    overwrite: bool
    """Replace the folder if it exists."""
    opset: int
    """Version of ONNX's operators. (default: 18)"""
    dynamic: bool
    """Take any number of images at a time."""
    fixed_batch: int | None
    """Take exactly N images at a time, as compilers for some devices need. (default: any number of images)"""
    input: Literal["float", "uint8"]
    """What the model takes, as (n, 3, side, side): float, RGB in [0, 1], or uint8, RGB in 0 … 255. The normalisation is
    part of the model. (default: float)"""
    logits: bool
    """Return logits."""
    probabilities: bool
    """Return probabilities."""
    verify: bool
    """Compare each file in its own runtime with PyTorch, on real images. (default: on)"""
    images: int
    """Images to compare on at most: of the validation split, else of the training images. (default: 500)"""
    quantize: Literal["8", "16"] | None
    """Also write a smaller ONNX file: 8 for integers of 8 bits, 16 for half precision. Layers that lose most stay in
    fp32. (default: off)"""
    max_drop: float
    """What the smaller file may lose, in percentage points: of accuracy on the validation images, or without labels of
    agreement with fp32. (default: 1)"""
    calibration: int
    """Training images by which the ranges of 8 bits are chosen; their labels are not used. (default: 512)"""
    sensitivity: bool
    """Measure how much each layer loses with 8 bits, also where none has to stay in fp32."""

class BenchmarkOptions(ImagesOptions, total=False):
    """Options of `funmatch.benchmark`."""

    device: str
    """Device to compute on: auto, cpu, or an accelerator by PyTorch's name (cuda, cuda:1, mps, xpu). (default: auto)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Floating-point format of the networks. auto is bf16 on accelerators that support it, fp16 with loss scaling on
    others; on a CPU fp32, or bf16 where the student trains clearly faster in it. (default: auto)"""
    classes_from: Literal["FILE", "data"] | None
    """For a network of image and text (clip:MODEL), the classes that it tells apart: a text file with a name a line; a
    JSON file with a list of names, or {"name": ["description", …], …}; or data, the class names of the images that it
    is evaluated on. Without it, its outputs are embeddings. (default: none)"""
    templates: Literal["openai-80", "short", "none", "FILE"] | None
    """Sentences in which a class name is put: openai-80, short, none, or a text file with one a line, {} where the name
    stands. (default: openai-80; none for descriptions)"""
    teacher_weights: Names
    """File with the weights (.safetensors, .pt or BiT .npz) of each teacher given by its timm name; `none` for one that
    brings its own. Its head decides the classes. (default: none)"""
    teacher_kwargs: KeyValues
    """Arguments for the teacher's constructor; with several teachers, for each of them. weights_key=KEY chooses among
    several weights in a file, e.g. state_dict_ema. (default: none)"""
    teacher_side: int | Sequence[int]
    """Image size of the teacher's views in pixels, one for all teachers or one each. The same crop is sampled at each
    size. (default: the student's)"""
    teacher_share: float | Sequence[float]
    """Weights of several teachers in their mean, one each. (default: equal)"""
    combine: Literal["mean-logits", "mean-probabilities"]
    """How several teachers become one: the mean of their logits, or of their probabilities at the temperature.
    (default: mean-logits)"""
    classes: str | None
    """For a teacher with other classes than the data: same-names matches classes by name; by-number sorts classes that
    are numbers by value, 2 before 10; a file map.json holds {"our class": "the teacher's", …}, by name, by number, or a
    list of these. (default: the teacher's classes)"""
    trust_class_order: bool
    """Continue although the class names of a teacher (or of the evaluated model) differ from the data's, or are numbers
    that it seems to have in another order, assuming the same order."""
    weights: str | Path | None
    """File with weights (.safetensors, .pt or BiT .npz), for a model given by its timm name. (default: none)"""
    model_kwargs: KeyValues
    """Arguments for timm's constructor. weights_key=KEY chooses among several weights in a file, e.g. state_dict_ema.
    (default: none)"""
    side: int | None
    """Image size: side of the square views, in pixels. (default: the run's or the model's own)"""
    img_size: int | None
    """The same as side."""
    eval_resize: int | None
    """Length of the image's shorter side before the central crop, in pixels. (default: the run's or the model's own)"""
    eval_resample: (
        Literal[
            "antialias",
            "bicubic",
            "area",
            "tf",
            "nearest",
            "lanczos",
            "box",
            "hamming",
            "torchvision-nearest",
            "torchvision-bilinear",
            "torchvision-bicubic",
            "torchvision-lanczos",
        ]
        | None
    )
    """How images are resized: antialias (bilinear), bicubic, area, tf (bilinear without antialias), nearest, lanczos,
    box, hamming, or a filter of torchvision's own code. (default: the run's or the model's own)"""
    batch: int
    """Images per forward pass. (default: 128)"""
    batch_size: int
    """The same as batch."""
    task: Literal["multiclass", "multilabel"] | None
    """What labels mean. multiclass: one class an image. multilabel: any number of them, each with a probability of its
    own. (default: the model's)"""
    data: Names
    """Images: a name of the catalog, a folder, or a source with its prefix, e.g. tfrecord:PATTERN, wds:PATTERN,
    hf:NAME, csv:FILE; or any of these at an address (gs://, s3://, hf://, https://). Several are joined. (default: the
    run's)"""
    teacher: Names
    """Teachers to measure beside the models and to compare their outputs with; none measures no teacher. (default: the
    run's)"""
    split: Literal["auto", "train", "val", "test"]
    """Split for top-1 and agreement; auto is test, else val, else train. (default: auto)"""
    images: int
    """Images for top-1 and agreement, at most; evenly spread over the split. (default: 500)"""
    formats: Names
    """Formats to measure, separated by commas. Without it, those that are not installed are skipped. (default: eager
    compiled onnx onnx-int8 openvino)"""
    threads: int | None
    """Threads of every runtime. (default: the cores that this process may use)"""
    batches: int | Sequence[int]
    """Batch sizes of which the one with the most images per second is taken for the throughput. (default: 1 8 32
    128)"""
    spread: float | str | None
    """Time in rounds until the interquartile range of their medians is at most this share of the median, e.g. 5% or
    0.05. (default: 5%)"""
    max_seconds: float
    """Time for each format, at most, whatever the spread is. (default: 20)"""
    memory: bool
    """Measure the peak memory of each format, in a process of its own, which takes some seconds. (default: on)"""
    report: str | Path | None
    """Page to write, with a plot of accuracy against latency; the plot is also written beside it, as .svg. (default:
    none)"""

class StudyOptions(TypedDict, total=False):
    """Options of `funmatch.study`."""

    config: str | Path | None
    """File of options: .toml (`funmatch config` writes a template), .yaml, or the config.json of a run. Options on the
    command line override it; paths in it are relative to the current folder. (default: none)"""
    seeds: int | Sequence[int]
    """Seeds of each run. (default: those of the file)"""
    jobs: int | None
    """Runs at a time. (default: one per core, or one where there is an accelerator)"""
    time_limit: float | str | None
    """Time from the start of the program after which all runs have saved and stopped: 8h30m, 510m, 30600 (seconds) or
    1-06:00:00. The same command resumes the study. (default: none; in a Slurm job, its end)"""
    max_time: float | str | None
    """The same as time_limit."""
    only: Names
    """Carry out only the runs with these names; * and ? stand for anything. (default: all runs)"""
    set: Names
    """Options that override the file's for all runs, e.g. epochs=10; after a run's name and a dot, for that run.
    (default: none)"""
    tapes: bool
    """Let runs that show the same teacher the same views share its logits (`distill --tape`). (default: on)"""
    draw: bool
    """Only redraw the page from results.jsonl."""

class EmbedOptions(TypedDict, total=False):
    """Options of `funmatch.embed`."""

    config: str | Path | None
    """File of options: .toml (`funmatch config` writes a template), .yaml, or the config.json of a run. Options on the
    command line override it; paths in it are relative to the current folder. (default: none)"""
    device: str
    """Device to compute on: auto, cpu, or an accelerator by PyTorch's name (cuda, cuda:1, mps, xpu). (default: auto)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Floating-point format of the networks. auto is bf16 on accelerators that support it, fp16 with loss scaling on
    others; on a CPU fp32, or bf16 where the student trains clearly faster in it. (default: auto)"""
    classes_from: Literal["FILE", "data"] | None
    """For a network of image and text (clip:MODEL), the classes that it tells apart: a text file with a name a line; a
    JSON file with a list of names, or {"name": ["description", …], …}; or data, the class names of the images that it
    is evaluated on. Without it, its outputs are embeddings. (default: none)"""
    templates: Literal["openai-80", "short", "none", "FILE"] | None
    """Sentences in which a class name is put: openai-80, short, none, or a text file with one a line, {} where the name
    stands. (default: openai-80; none for descriptions)"""
    weights: str | Path | None
    """File with weights (.safetensors, .pt or BiT .npz), for a model given by its timm name. (default: none)"""
    model_kwargs: KeyValues
    """Arguments for timm's constructor. weights_key=KEY chooses among several weights in a file, e.g. state_dict_ema.
    (default: none)"""
    side: int | None
    """Image size: side of the square views, in pixels. (default: the run's or the model's own)"""
    img_size: int | None
    """The same as side."""
    eval_resize: int | None
    """Length of the image's shorter side before the central crop, in pixels. (default: the run's or the model's own)"""
    eval_resample: (
        Literal[
            "antialias",
            "bicubic",
            "area",
            "tf",
            "nearest",
            "lanczos",
            "box",
            "hamming",
            "torchvision-nearest",
            "torchvision-bilinear",
            "torchvision-bicubic",
            "torchvision-lanczos",
        ]
        | None
    )
    """How images are resized: antialias (bilinear), bicubic, area, tf (bilinear without antialias), nearest, lanczos,
    box, hamming, or a filter of torchvision's own code. (default: the run's or the model's own)"""
    batch: int
    """Images per forward pass. (default: 128)"""
    batch_size: int
    """The same as batch."""
    split: Literal["auto", "train", "val", "test", "all"] | None
    """Split of data sets that have several; auto is test, else val, else train. (default: auto, and of a folder all
    images)"""
    cap: int | None
    """Images whose shorter side is longer than this, in pixels, are scaled down to it first, as `evaluate` does.
    (default: the run's, or 512)"""
    decoder: Literal["auto", "pillow", "torchcodec"] | None
    """JPEG decoder; auto is torchcodec where it is installed, else Pillow. (default: the run's, or auto)"""
    max_pixels: int | None
    """Larger images are rejected as decompression bombs. Those of more than 32,000,000 pixels are decoded one at a
    time. (default: the run's, or 178,956,970)"""
    max_scans: int | None
    """JPEGs of more progressive scans are rejected: each scan takes the time of a whole image. (default: the run's, or
    100)"""
    image_feature: str | None
    """In shards and tables: the feature, file ending or column that holds the image, or its path. (default: one of the
    usual names)"""
    path_column: str | None
    """The same as image_feature."""
    split_column: str | None
    """In tables of paths: the column that says train, val or test; none for no splits. (default: one of the usual
    names)"""
    image_root: str | Path | None
    """In tables of paths: the folder that paths are relative to. (default: that of the table)"""
    data_dir: str | Path | None
    """Folder that holds the catalog's data sets, and into which they are downloaded. (default: $FUNMATCH_DATA, or a
    folder in the user's cache)"""

class PredictOptions(TypedDict, total=False):
    """Options of `funmatch.predict`."""

    config: str | Path | None
    """File of options: .toml (`funmatch config` writes a template), .yaml, or the config.json of a run. Options on the
    command line override it; paths in it are relative to the current folder. (default: none)"""
    device: str
    """Device to compute on: auto, cpu, or an accelerator by PyTorch's name (cuda, cuda:1, mps, xpu). (default: auto)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Floating-point format of the networks. auto is bf16 on accelerators that support it, fp16 with loss scaling on
    others; on a CPU fp32, or bf16 where the student trains clearly faster in it. (default: auto)"""
    classes_from: Literal["FILE", "data"] | None
    """For a network of image and text (clip:MODEL), the classes that it tells apart: a text file with a name a line; a
    JSON file with a list of names, or {"name": ["description", …], …}; or data, the class names of the images that it
    is evaluated on. Without it, its outputs are embeddings. (default: none)"""
    templates: Literal["openai-80", "short", "none", "FILE"] | None
    """Sentences in which a class name is put: openai-80, short, none, or a text file with one a line, {} where the name
    stands. (default: openai-80; none for descriptions)"""
    weights: str | Path | None
    """File with weights (.safetensors, .pt or BiT .npz), for a model given by its timm name. (default: none)"""
    model_kwargs: KeyValues
    """Arguments for timm's constructor. weights_key=KEY chooses among several weights in a file, e.g. state_dict_ema.
    (default: none)"""
    side: int | None
    """Image size: side of the square views, in pixels. (default: the run's or the model's own)"""
    img_size: int | None
    """The same as side."""
    eval_resize: int | None
    """Length of the image's shorter side before the central crop, in pixels. (default: the run's or the model's own)"""
    eval_resample: (
        Literal[
            "antialias",
            "bicubic",
            "area",
            "tf",
            "nearest",
            "lanczos",
            "box",
            "hamming",
            "torchvision-nearest",
            "torchvision-bilinear",
            "torchvision-bicubic",
            "torchvision-lanczos",
        ]
        | None
    )
    """How images are resized: antialias (bilinear), bicubic, area, tf (bilinear without antialias), nearest, lanczos,
    box, hamming, or a filter of torchvision's own code. (default: the run's or the model's own)"""
    batch: int
    """Images per forward pass. (default: 128)"""
    batch_size: int
    """The same as batch."""
    split: Literal["auto", "train", "val", "test", "all"] | None
    """Split of data sets that have several; auto is test, else val, else train. (default: auto, and of a folder all
    images)"""
    cap: int | None
    """Images whose shorter side is longer than this, in pixels, are scaled down to it first, as `evaluate` does.
    (default: the run's, or 512)"""
    decoder: Literal["auto", "pillow", "torchcodec"] | None
    """JPEG decoder; auto is torchcodec where it is installed, else Pillow. (default: the run's, or auto)"""
    max_pixels: int | None
    """Larger images are rejected as decompression bombs. Those of more than 32,000,000 pixels are decoded one at a
    time. (default: the run's, or 178,956,970)"""
    max_scans: int | None
    """JPEGs of more progressive scans are rejected: each scan takes the time of a whole image. (default: the run's, or
    100)"""
    image_feature: str | None
    """In shards and tables: the feature, file ending or column that holds the image, or its path. (default: one of the
    usual names)"""
    path_column: str | None
    """The same as image_feature."""
    split_column: str | None
    """In tables of paths: the column that says train, val or test; none for no splits. (default: one of the usual
    names)"""
    image_root: str | Path | None
    """In tables of paths: the folder that paths are relative to. (default: that of the table)"""
    data_dir: str | Path | None
    """Folder that holds the catalog's data sets, and into which they are downloaded. (default: $FUNMATCH_DATA, or a
    folder in the user's cache)"""
    topk: int
    """Number of classes to list for each image, the most probable first. (default: 5)"""
    threshold: float
    """List only classes of at least this probability; an image without one keeps its row, with an empty class.
    (default: 0)"""
    teacher: Model | None
    """A model whose class and probability stand beside, with agreement and KL divergence, in nats. It sees each image
    by its own preprocessing. (default: none)"""
    teacher_weights: str | Path | None
    """File with the teacher's weights, for a teacher given by its timm name. (default: none)"""
    teacher_side: int | None
    """Image size of the teacher, in pixels. (default: the teacher's own)"""
    classes: str | None
    """For a teacher with other classes: same-names matches classes by name; by-number sorts classes that are numbers by
    value; a file map.json holds {"our class": "the teacher's", …}, by name, by number, or a list of these. (default:
    the same as the model's)"""
    trust_class_order: bool
    """Compare with a teacher whose class names differ, assuming the same order."""

class SelectOptions(TypedDict, total=False):
    """Options of `funmatch.select`."""

    device: str
    """Device to compute on: auto, cpu, or an accelerator by PyTorch's name (cuda, cuda:1, mps, xpu). (default: auto)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Floating-point format of the networks. auto is bf16 on accelerators that support it, fp16 with loss scaling on
    others; on a CPU fp32, or bf16 where the student trains clearly faster in it. (default: auto)"""
    classes_from: Literal["FILE", "data"] | None
    """For a network of image and text (clip:MODEL), the classes that it tells apart: a text file with a name a line; a
    JSON file with a list of names, or {"name": ["description", …], …}; or data, the class names of the images that it
    is evaluated on. Without it, its outputs are embeddings. (default: none)"""
    templates: Literal["openai-80", "short", "none", "FILE"] | None
    """Sentences in which a class name is put: openai-80, short, none, or a text file with one a line, {} where the name
    stands. (default: openai-80; none for descriptions)"""
    weights: str | Path | None
    """File with weights (.safetensors, .pt or BiT .npz), for a teacher given by its timm name. (default: none)"""
    teacher_weights: str | Path | None
    """The same as weights."""
    model_kwargs: KeyValues
    """Arguments for timm's constructor. weights_key=KEY chooses among several weights in a file, e.g. state_dict_ema.
    (default: none)"""
    side: int | None
    """Image size: side of the square views, in pixels. (default: the run's or the model's own)"""
    img_size: int | None
    """The same as side."""
    eval_resize: int | None
    """Length of the image's shorter side before the central crop, in pixels. (default: the run's or the model's own)"""
    eval_resample: (
        Literal[
            "antialias",
            "bicubic",
            "area",
            "tf",
            "nearest",
            "lanczos",
            "box",
            "hamming",
            "torchvision-nearest",
            "torchvision-bilinear",
            "torchvision-bicubic",
            "torchvision-lanczos",
        ]
        | None
    )
    """How images are resized: antialias (bilinear), bicubic, area, tf (bilinear without antialias), nearest, lanczos,
    box, hamming, or a filter of torchvision's own code. (default: the run's or the model's own)"""
    batch: int
    """Images per forward pass. (default: 128)"""
    batch_size: int
    """The same as batch."""
    split: Literal["auto", "train", "val", "test", "all"] | None
    """Split of data sets that have several; auto is test, else val, else train. (default: auto, and of a folder all
    images)"""
    cap: int | None
    """Images whose shorter side is longer than this, in pixels, are scaled down to it first, as `evaluate` does.
    (default: the run's, or 512)"""
    decoder: Literal["auto", "pillow", "torchcodec"] | None
    """JPEG decoder; auto is torchcodec where it is installed, else Pillow. (default: the run's, or auto)"""
    max_pixels: int | None
    """Larger images are rejected as decompression bombs. Those of more than 32,000,000 pixels are decoded one at a
    time. (default: the run's, or 178,956,970)"""
    max_scans: int | None
    """JPEGs of more progressive scans are rejected: each scan takes the time of a whole image. (default: the run's, or
    100)"""
    image_feature: str | None
    """In shards and tables: the feature, file ending or column that holds the image, or its path. (default: one of the
    usual names)"""
    path_column: str | None
    """The same as image_feature."""
    split_column: str | None
    """In tables of paths: the column that says train, val or test; none for no splits. (default: one of the usual
    names)"""
    image_root: str | Path | None
    """In tables of paths: the folder that paths are relative to. (default: that of the table)"""
    data_dir: str | Path | None
    """Folder that holds the catalog's data sets, and into which they are downloaded. (default: $FUNMATCH_DATA, or a
    folder in the user's cache)"""
    per_class: int
    """Most images of a class. (default: 500)"""
    min_confidence: float
    """Least probability that the teacher must give to its class. (default: 0)"""
    without: Names
    """Images to keep clear of, e.g. those that the student is evaluated on: near copies of them are left out. Of data
    sets with several splits, these are the validation and test images. (default: none)"""
    alike: float
    """How alike two images are if one counts as a near copy of the other: correlation of their grey thumbnails, which
    may be mirrored or cut by up to a tenth. (default: 0.95)"""
    extract: str | Path | None
    """Folder to write the chosen images into, as they are encoded, which the table then names; needed where they are no
    files of their own, as in shards. (default: none)"""
    overwrite: bool
    """Replace the file out if it exists."""

@overload
def distill(
    data: Images,
    teacher: Models,
    student: Model,
    out: str | Path,
    *,
    config: str | Path | None = None,
    recipe: str | None = None,
    on_event: OnEvent | None = None,
    **options: Unpack[DistillOptions],
) -> Outcome: ...
@overload
def distill(
    data: Images | None = None,
    teacher: Models | None = None,
    student: Model | None = None,
    out: str | Path | None = None,
    *,
    config: str | Path,
    recipe: str | None = None,
    on_event: OnEvent | None = None,
    **options: Unpack[DistillOptions],
) -> Outcome: ...
@overload
def distill(
    data: Images | None = None,
    teacher: Models | None = None,
    student: Model | None = None,
    out: str | Path | None = None,
    *,
    recipe: str,
    config: str | Path | None = None,
    on_event: OnEvent | None = None,
    **options: Unpack[DistillOptions],
) -> Outcome: ...
def distill_several(
    data: Images, teacher: Names, students: Sequence[str], out: str | Path, **options: Unpack[DistillOptions]
) -> list[Outcome]: ...
@overload
def train(
    data: Images,
    student: Model,
    out: str | Path,
    *,
    config: str | Path | None = None,
    recipe: str | None = None,
    on_event: OnEvent | None = None,
    **options: Unpack[TrainOptions],
) -> Outcome: ...
@overload
def train(
    data: Images | None = None,
    student: Model | None = None,
    out: str | Path | None = None,
    *,
    config: str | Path,
    recipe: str | None = None,
    on_event: OnEvent | None = None,
    **options: Unpack[TrainOptions],
) -> Outcome: ...
@overload
def train(
    data: Images | None = None,
    student: Model | None = None,
    out: str | Path | None = None,
    *,
    recipe: str,
    config: str | Path | None = None,
    on_event: OnEvent | None = None,
    **options: Unpack[TrainOptions],
) -> Outcome: ...
@overload
def finetune(
    data: Images,
    model: Model,
    out: str | Path,
    *,
    config: str | Path | None = None,
    recipe: str | None = None,
    on_event: OnEvent | None = None,
    **options: Unpack[FinetuneOptions],
) -> Outcome: ...
@overload
def finetune(
    data: Images | None = None,
    model: Model | None = None,
    out: str | Path | None = None,
    *,
    config: str | Path,
    recipe: str | None = None,
    on_event: OnEvent | None = None,
    **options: Unpack[FinetuneOptions],
) -> Outcome: ...
@overload
def finetune(
    data: Images | None = None,
    model: Model | None = None,
    out: str | Path | None = None,
    *,
    recipe: str,
    config: str | Path | None = None,
    on_event: OnEvent | None = None,
    **options: Unpack[FinetuneOptions],
) -> Outcome: ...
@overload
def head(
    data: Images, model: Model, out: str | Path, *, config: str | Path | None = None, **options: Unpack[HeadOptions]
) -> Result: ...
@overload
def head(
    data: Images | None = None,
    model: Model | None = None,
    out: str | Path | None = None,
    *,
    config: str | Path,
    **options: Unpack[HeadOptions],
) -> Result: ...
def recipe(name: str, *, on_event: OnEvent | None = None, **options: Unpack[RecipeOptions]) -> Outcome: ...
@overload
def prepare(data: Images, *, config: str | Path | None = None, **options: Unpack[PrepareOptions]) -> dict[str, Any]: ...
@overload
def prepare(data: Images | None = None, *, config: str | Path, **options: Unpack[PrepareOptions]) -> dict[str, Any]: ...
def tune(
    what: str,
    out: str | Path | None = None,
    *,
    space: Mapping[str, Any] | Sequence[str] = (),
    **options: Unpack[TuneOptions],
) -> Tuned: ...
def study(
    name: str | Path | None = None, out: str | Path | None = None, **options: Unpack[StudyOptions]
) -> dict[str, Any]: ...
@overload
def evaluate(
    model: Model, *, config: str | Path | None = None, **options: Unpack[EvaluateOptions]
) -> dict[str, Any]: ...
@overload
def evaluate(
    model: Model | None = None, *, config: str | Path, **options: Unpack[EvaluateOptions]
) -> dict[str, Any]: ...
@overload
def export(
    model: Model, out: str | Path | None = None, *, config: str | Path | None = None, **options: Unpack[ExportOptions]
) -> dict[str, Any]: ...
@overload
def export(
    model: Model | None = None, out: str | Path | None = None, *, config: str | Path, **options: Unpack[ExportOptions]
) -> dict[str, Any]: ...
@overload
def benchmark(
    models: Model | Sequence[Model], *, config: str | Path | None = None, **options: Unpack[BenchmarkOptions]
) -> dict[str, Any]: ...
@overload
def benchmark(
    models: Model | Sequence[Model] | None = None, *, config: str | Path, **options: Unpack[BenchmarkOptions]
) -> dict[str, Any]: ...
@overload
def predict(model: Model, images: Picture, **options: Unpack[PredictOptions]) -> Prediction: ...
@overload
def predict(model: Model, images: str | Path | np.ndarray | Tensor, **options: Unpack[PredictOptions]) -> Any: ...
@overload
def predict(model: Model, images: Iterable[AnyImage], **options: Unpack[PredictOptions]) -> Predictions: ...
def embed(model: Model, images: AnyImage | Iterable[AnyImage], **options: Unpack[EmbedOptions]) -> np.ndarray: ...
@overload
def select(
    pool: Images,
    teacher: Model,
    out: str | Path | None = None,
    *,
    config: str | Path | None = None,
    **options: Unpack[SelectOptions],
) -> dict[str, Any]: ...
@overload
def select(
    pool: Images | None = None,
    teacher: Model | None = None,
    out: str | Path | None = None,
    *,
    config: str | Path,
    **options: Unpack[SelectOptions],
) -> dict[str, Any]: ...
def load(
    model: Model,
    *,
    weights: str | Path | None = None,
    options: Mapping[str, Any] | Sequence[str] = (),
    classes: int | None = None,
    side: int | None = None,
    pretrained: bool = True,
    inputs: Any = None,
) -> Classifier: ...

"""Answers the words of other tools with ours."""

import re

from funmatch.config.help import flags_of, metavar
from funmatch.config.options import Options

COMMANDS = {
    "evaluate": ("val", "validate", "validation", "test", "eval", "score", "compare"),
    "train": ("fit", "run"),
    "distill": ("distil", "kd", "teach"),
    "finetune": ("fine-tune", "fine_tune", "transfer"),
    "tune": ("sweep", "search", "hpo", "optimize"),
    "models": ("list", "list-models", "zoo"),
    "data": ("dataset", "datasets", "check"),
    "plan": ("estimate", "dry-run"),
    "prepare": ("download",),
    "cache": ("clean", "clear", "gc"),
    "import": ("convert",),
    "predict": ("infer", "inference", "classify", "label"),
    "select": ("choose", "filter", "pseudo-label", "curate"),
    "embed": ("features", "extract", "embeddings"),
    "export": ("onnx", "to-onnx", "quantize", "deploy"),
    "benchmark": ("bench", "speed", "latency", "throughput"),
}
"""Our commands, and what other tools call them."""
USE_IT = ("serve",)
"""Commands of other tools for what timm does with a student."""
COMPLETION = ("install-completion", "show-completion", "completion", "tyro-print-completion")
COMPLETE = 'completion of the shell: eval "$(funmatch --print-completion bash)" (or zsh, fish)'
TIMM = "a student is a folder that timm loads: timm.create_model('local-dir:RUN/student', pretrained=True)"
OPTIONS = {
    "every metric is in metrics.jsonl of the run folder, which any tracker can read": (
        "wandb", "log-wandb", "tensorboard", "logger", "tracker", "report-to", "mlflow",
    ),
    "start one process for each GPU with torchrun --nproc-per-node N, or choose one with --device cuda:1": (
        "gpus", "gpu", "num-gpus", "ngpus", "devices", "nproc", "nproc-per-node", "world-size", "num-processes",
    ),
    "the same command resumes from the newest checkpoint in --out; --student-weights FILE starts from weights": (
        "resume", "auto-resume", "resume-from", "resume-from-checkpoint", "checkpoint", "ckpt", "ckpt-path",
        "initial-checkpoint",
    ),
    "use --time-limit 8h; the run saves first, and the same command resumes it": ("max-hours", "timeout"),
    "use --precision bf16, fp16 or fp32": ("amp", "fp16", "bf16", "half", "mixed-precision", "amp-dtype"),
    "name published weights by their tag, e.g. --student resnet18.a1_in1k": ("pretrained",),
    "use --warmup-steps": ("warmup-epochs", "warmup-lr", "warmup"),
    "use --student": ("arch", "architecture", "model-name", "student-model"),
    "use --lr": ("learning-rate", "base-lr"),
    "use --side": ("image-size", "input-size", "res", "resolution", "crop-size"),
    "use --epochs": ("num-epochs", "num-train-epochs", "max-epochs"),
    "use --steps": ("max-steps", "num-steps", "total-steps", "iterations"),
    "use --batch": ("bs",),
    "use --weight-decay": ("wd",),
    "use --schedule": ("sched", "lr-scheduler", "scheduler"),
    "use --out FOLDER": ("output", "output-dir", "save-dir", "out-dir", "project", "experiment", "name", "exp-name"),
    "use --data": ("data-path", "train-dir", "train-data", "dataset", "root"),
    "use --val 10%, or --eval-data for other images": ("val-dir", "val-data", "val-split", "validation-split"),
    "the number of classes is that of the data, or of the teacher": ("num-classes",),
    "use --workers": ("num-workers", "dataloader-num-workers"),
    "use --label-weight W, for (1 − W) · distance + W · cross-entropy on labels": ("alpha", "kd-weight", "ce-weight"),
    "use --temperature": ("tau", "temp", "kd-temperature"),
    "use --sampling balanced": ("sampler", "balanced-sampler", "weighted-sampler", "balanced-sampling", "oversample"),
    "use --class-weights balanced": ("class-weight", "weighted-loss", "pos-weight", "balanced-loss"),
    "use --micro-batch, the images in a pass": ("gradient-accumulation-steps", "grad-accum-steps", "accumulate"),
    COMPLETE: COMPLETION,
    "from Python, on_event=FUNCTION is called with each record of metrics.jsonl in the run folder": (
        "callback", "callbacks", "hook", "hooks",
    ),
    "evaluate gives the metrics of each class and the confusions; --json prints all of them": (
        "per-class", "confusion", "confusion-matrix",
    ),
    "an image has one class here; several classes of one image are not supported": (
        "multi-label", "multilabel", "bce", "bce-loss",
    ),
    "RUN/student is in the format of timm's models on the Hub: hf upload USER/NAME RUN/student": (
        "push-to-hub", "hub-model-id", "publish",
    ),
    "progress and messages go to standard error, results to standard output": ("quiet", "verbose", "q", "v"),
}  # fmt: skip
"""What to do here, and the options of other tools for it."""


def command_hint(word: str) -> str:
    """Returns a sentence about another tool's command; empty where it is not known."""
    for ours, theirs in COMMANDS.items():
        if word.lower() in theirs:
            return f"here it is `funmatch {ours}`"
    if word.lower().lstrip("-") in COMPLETION:
        return COMPLETE
    return TIMM if word.lower() in USE_IT else ""


def option_hint(flag: str, table: type[Options]) -> str:
    """Returns a sentence about another tool's option; empty where it is not known, or the command has none for it."""
    name = flag.lstrip("-").replace("_", "-").lower()
    hint = next((ours for ours, theirs in OPTIONS.items() if name in theirs), "")
    return _in_words_of(table, hint) if hint.startswith("use --") else hint


def _in_words_of(table: type[Options], hint: str) -> str:
    """Returns a hint `use --option …` with the command's own name for it; empty where it has no such option."""
    flag = re.findall(r"--[a-z-]+", hint)[0]
    field = table.field_of(flag)
    # `finetune` calls the student a model, and for `evaluate` it is what `model` is for them.
    if field is None and flag == "--student":
        field = table.field_of("--model")
    if field is None:
        return ""
    if table.opt(field).positional:
        return f"give {metavar(table, field)} as the first word"
    own = next(each for each in flags_of(table, field) if each.startswith("--"))
    return hint.replace(flag, own, 1)

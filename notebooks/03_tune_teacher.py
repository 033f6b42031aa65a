# %% [markdown]
# # 3 · A better teacher
#
# A search for the teacher's learning rate, as in
# [FunMatch-Distillation](https://github.com/sayakpaul/FunMatch-Distillation): random search over four values, three
# trials of two executions each, with early stopping. Its best network reached 90.32 % on the test images of Pet37,
# its hand-tuned teacher 90.92 %.
#
# Only validation images select; the test images are evaluated once, with the best trial.
#
# With other images than the embedded ones it needs an accelerator. **After a session has ended, run the notebook again
# to resume**; an interrupted trial resumes from its last checkpoint.

# %% [markdown]
# On Kaggle and Colab, the next cell installs funmatch from `SOURCE`. On Colab, mount Google Drive, so that runs outlast
# the session. On Kaggle, add the output of the earlier session to the notebook's inputs.

# %% tags=["install"]
# Does nothing where funmatch can be imported. pip keeps the host's PyTorch and timm if they are recent enough.
SOURCE = ""  # a clone or a wheel of funmatch, by its path or URL; empty: the clone that this notebook is in
PACKAGE = "funmatch[tune]"
import importlib.util
import subprocess
import sys
from pathlib import Path

if not all(importlib.util.find_spec(name) for name in ("funmatch", "torch", "timm", "optuna")):
    clones = [str(each) for each in (Path.cwd(), *Path.cwd().parents) if (each / "funmatch" / "api.py").is_file()]
    if not (source := SOURCE or "".join(clones[:1])):
        raise ModuleNotFoundError(
            f"{PACKAGE} is not installed, and this notebook is not in a clone of its repository: set SOURCE above to "
            "the path of a clone or of a wheel, or to a URL (https://….whl, git+https://…), and run this cell again"
        )
    url = source if "://" in source else Path(source).expanduser().resolve().as_uri()
    command = [sys.executable, "-m", "pip", "install", "-q", f"{PACKAGE} @ {url}"]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        raise RuntimeError(f"pip could not install {PACKAGE} from {url}:\n{done.stderr}")
    importlib.invalidate_caches()

# %%
# from google.colab import drive; drive.mount("/content/drive")  # remove the first # on Colab

# %% [markdown]
# ## Which images?
#
# `fashion-mini`, 2,700 small images, is part of funmatch: with it, every cell runs in minutes on a CPU and without a
# network. `pet37`, `flowers102` and `food101` are downloaded. For images of your own, enter a folder of
# `<split>/<class>/…` or `<class>/…`, such as `"/kaggle/input/flowers"`; without a `val` folder, a tenth of the training
# images is held out. Their runs use the recipes of Pet37; `OPTIONS` overrides them.

# %% tags=["parameters"]
DATA = "fashion-mini"  # embedded, minutes on a CPU; or "pet37", "flowers102", "food101", or a folder of your own
TEACHER = "tf-teacher-{}"  # the recipe; or "teacher-{}-r101x3", "teacher-{}", which search lr=log:3e-4..3e-2
SPACE = {}  # added to the recipe's search space, e.g. {"lr": "log:1e-5..3e-3", "weight_decay": "0,1e-5,1e-4"}
TRIALS = 3  # learning rates to try
EXECUTIONS = 2  # runs of each, with different seeds
PATIENCE = 3  # evaluations without an improvement after which a run ends
OPTIONS = {}  # override the recipe, e.g. {"sampler": "tpe", "micro_batch": 32}

# %%
import funmatch
from funmatch import notebook

place = notebook.place(DATA)
place

# %%
notebook.bring_runs(place)

# %% [markdown]
# ## The search
#
# Each trial is a run folder with its checkpoints, about 9 GB a run for BiT-R101x3. A second process with the same
# call shares the work.

# %%
study = place.runs / f"tune-teacher-{place.name}"
search = {"space": SPACE, "trials": TRIALS, "executions": EXECUTIONS, "patience": PATIENCE}
with place.session():
    funmatch.tune(TEACHER.format(place.recipes), out=study, **search, **place.teacher | OPTIONS)

# %% [markdown]
# ## Results
#
# Every trial, the best first; the metrics of the best one, with the spread over its executions; and how often each
# split was evaluated.

# %%
notebook.searched(study)

# %%
notebook.search_plots(study)

# %% [markdown]
# To distil from the best run, set `TEACHER = "tune-teacher-{}"` in notebook 4.

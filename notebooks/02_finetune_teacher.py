# %% [markdown]
# # 2 · The teacher
#
# This notebook fine-tunes a pretrained network on the labels; the result is the teacher. The recipe is that of
# [FunMatch-Distillation](https://github.com/sayakpaul/FunMatch-Distillation) (BiT-R101x3, 128 pixels, 450 steps of
# 512 images; it reports 90.92 % on the test images of Pet37), or BiT-HyperRule as in [the
# paper](https://arxiv.org/abs/2106.05237), whose BiT-R152x2 has 91.03 %.
#
# With other images than the embedded ones it needs an accelerator. **After a session has ended, run the notebook again
# to resume.**

# %% [markdown]
# On Kaggle and Colab, the next cell installs funmatch from `SOURCE`. On Colab, mount Google Drive, so that runs outlast
# the session. On Kaggle, add the output of the earlier session to the notebook's inputs.

# %% tags=["install"]
# Does nothing where funmatch can be imported. pip keeps the host's PyTorch and timm if they are recent enough.
SOURCE = ""  # a clone or a wheel of funmatch, by its path or URL; empty: the clone that this notebook is in
PACKAGE = "funmatch"
import importlib.util
import subprocess
import sys
from pathlib import Path

if not all(importlib.util.find_spec(name) for name in ("funmatch", "torch", "timm")):
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
TEACHER = "tf-teacher-{}"  # or by BiT-HyperRule: "teacher-{}-r101x3", or the paper's "teacher-{}" (BiT-R152x2)
OPTIONS = {}  # override the recipe, e.g. {"micro_batch": 32, "grad_checkpointing": True} for less memory
MEASURE = True  # estimate the hours on this machine, which takes some seconds

# %%
import funmatch
from funmatch import notebook

place = notebook.place(DATA)
place

# %%
notebook.bring_runs(place)

# %% [markdown]
# ## The recipe
#
# Its command, the published accuracy, and the estimated hours on this machine. `funmatch recipes` lists all recipes.

# %%
recipe = TEACHER.format(place.recipes)
options = place.teacher | OPTIONS
notebook.about(recipe, options, measure=MEASURE)

# %% [markdown]
# ## What the run will do
#
# Its learning rate by step, the crops that it draws of these images, and its first views.

# %%
teacher = place.runs / TEACHER.format(place.name)
notebook.planned(recipe, out=teacher, **options)

# %% [markdown]
# ## The run
#
# The checkpoint with the best validation accuracy is kept. Shortly before the session ends, the run saves and stops.

# %%
with place.session():
    funmatch.recipe(recipe, out=teacher, **options)

# %%
notebook.curves(teacher)

# %% [markdown]
# The test images are evaluated once, at the end:

# %%
notebook.figures(teacher)

# %% [markdown]
# The views of the first step:

# %%
notebook.views(teacher)

# %% [markdown]
# `report.html` in the run's folder is the full report, with how often each split was evaluated and what differs from
# the recipe. Next: search for a better learning rate (notebook 3), or distil (notebook 4).

# %%
teacher

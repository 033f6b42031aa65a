# %% [markdown]
# # 4 · The student
#
# Function matching: teacher and student see the same crop, flipped and mixed; the student matches the teacher's
# probabilities; labels are not used; training runs for long. Here a BiT-R50x1 learns from the teacher of notebook 2
# or 3.
#
# | Pet37, 128 pixels, test top-1 | teacher | 300 epochs | 1,000 epochs |
# |---|---|---|---|
# | [the paper](https://arxiv.org/abs/2106.05237), table 4 | 91.03 | 82.75 | 88.01 |
# | [FunMatch-Distillation](https://github.com/sayakpaul/FunMatch-Distillation) | 90.92 | 81.3 | 86 |
#
# With other images than the embedded ones it needs an accelerator. **After a session has ended, run the notebook again
# to resume.**

# %% [markdown]
# On Kaggle and Colab, the next cell installs funmatch from `SOURCE`. On Colab, mount Google Drive, so that runs outlast
# the session. On Kaggle, add the outputs of notebook 2 and of the earlier session to the
# notebook's inputs.

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
TEACHER = "tf-teacher-{}"  # a run of notebook 2, or the search of notebook 3: "tune-teacher-{}"
STUDENTS = {"pet37": "tf-pet37-300", "flowers102": "tf-flowers102-1000", "food101": "tf-food101-100"}
OPTIONS = {}  # override the recipe, e.g. {"epochs": 1000, "micro_batch": 128}
MEASURE = True  # estimate the hours on this machine, which takes some seconds

# %%
import timm

import funmatch
from funmatch import notebook

place = notebook.place(DATA)
place

# %%
notebook.bring_runs(place)

# %% [markdown]
# ## The recipe
#
# The earlier project's settings. The paper's recipes are called `pet37-fast` and so on; `funmatch recipes` lists
# them.

# %%
recipe = STUDENTS[place.recipes]
options = place.student | OPTIONS
notebook.about(recipe, options, measure=MEASURE)

# %% [markdown]
# ## What the run will do
#
# Its learning rate by step, with warm-up and weight decay; the weights that MixUp draws; the crops of these images; and
# the first views.

# %%
teacher = place.run(TEACHER.format(place.name))
student = place.runs / recipe.replace(place.recipes, place.name)
notebook.planned(recipe, out=student, teacher=teacher, **options)

# %% [markdown]
# ## The run
#
# First the teacher is evaluated on the validation images; near chance, it is an error. Shortly before the session
# ends, the run saves and stops.

# %%
with place.session():
    funmatch.recipe(recipe, out=student, teacher=teacher, **options)

# %% [markdown]
# ## The views of teacher and student
#
# In steps 0 and 1: each step has its own crop and λ, and both models see the same pixels.

# %%
notebook.views(student, step=0)

# %%
notebook.views(student, step=1)

# %% [markdown]
# ## Curves
#
# The dashed line is the teacher. A curve that looks flat early still rises: long training is half of the method.

# %%
notebook.curves(student)

# %% [markdown]
# ## Evaluation
#
# Agreement is the share of images for which student and teacher predict the same class. KL, in nats, is the
# divergence of the student's probabilities from the teacher's. ECE is the expected calibration error.

# %%
notebook.figures(teacher, student)

# %%
notebook.judged(student, split="val", data_dir=place.data)

# %% [markdown]
# ## Use the student elsewhere
#
# The finished student is a folder in timm's layout and does not need funmatch.

# %% tags=["raises-exception"]
model = timm.create_model(f"local-dir:{student / 'student'}", pretrained=True)
model.pretrained_cfg["input_size"], model.pretrained_cfg["mean"], model.num_classes

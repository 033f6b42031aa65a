# %% [markdown]
# # 2 · The teacher
#
# This notebook fine-tunes a pretrained network on the labels; the result is the teacher. The recipe is that of
# [FunMatch-Distillation](https://github.com/sayakpaul/FunMatch-Distillation) (BiT-R101x3, 128 pixels, 450 steps of
# 512 images; it reports 90.92 % on the test images of Pet37), or BiT-HyperRule as in [the
# paper](https://arxiv.org/abs/2106.05237), whose BiT-R152x2 has 91.03 %.
#
# It needs an accelerator. **After a session has ended, run the notebook again to resume.**

# %% [markdown]
# On Kaggle or Colab, install funmatch first: remove the `#` and enter the path of its repository, cloned or among the
# inputs. On Colab, mount Google Drive, so that runs outlast the session. On Kaggle, add the output of the earlier
# session to the notebook's inputs.

# %%
# # %pip install -q PATH_OF_FUNMATCH

# %%
# from google.colab import drive; drive.mount("/content/drive")

# %% tags=["parameters"]
DATA = "pet37"  # or "flowers102", "food101"
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
recipe = TEACHER.format(DATA)
notebook.about(recipe, measure=MEASURE)

# %% [markdown]
# ## The run
#
# The checkpoint with the best validation accuracy is kept. Shortly before the session ends, the run saves and stops.

# %%
teacher = place.runs / recipe
with place.session():
    funmatch.recipe(recipe, out=teacher, data_dir=place.data, **OPTIONS)

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

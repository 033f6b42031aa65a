# %% [markdown]
# # 2 · The teacher
#
# A network with pretrained weights is taught the labels: a teacher. The recipe is that of
# [FunMatch-Distillation](https://github.com/sayakpaul/FunMatch-Distillation) (BiT-R101x3, 128 pixels, 450 steps of 512
# images; it reports 90.92 % on the test images of Pet37), or BiT-HyperRule as in
# [the paper](https://arxiv.org/abs/2106.05237), whose BiT-R152x2 has 91.03 %.
#
# It needs an accelerator. **Run the notebook again after a session's end, and it goes on where it was.**

# %% [markdown]
# On Kaggle or Colab, install funmatch first: take the `#` away, and name
# the folder of its repository, cloned or among the inputs. On Colab, mount Google Drive, where runs last longer
# than a session. On Kaggle, add the output of the earlier session to the notebook's inputs.

# %%
# # %pip install -q PATH_OF_FUNMATCH

# %%
# from google.colab import drive; drive.mount("/content/drive")

# %% tags=["parameters"]
DATA = "pet37"  # or "flowers102", "food101"
TEACHER = "tf-teacher-{}"  # or BiT-HyperRule's "teacher-{}-r101x3", and the paper's "teacher-{}" (BiT-R152x2)
KNOBS = {}  # what is said beside the recipe, e.g. {"micro_batch": 32, "grad_checkpointing": True} for less memory
MEASURE = True  # how many hours it takes here, which takes some seconds

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
# Its command, what was published, and what it takes on this machine. All recipes: `funmatch recipes`.

# %%
recipe = TEACHER.format(DATA)
notebook.about(recipe, measure=MEASURE)

# %% [markdown]
# ## The run
#
# The network that the validation images like most is kept. Shortly before the session ends it stops and saves.

# %%
teacher = place.runs / recipe
with place.session():
    funmatch.recipe(recipe, out=teacher, data_dir=place.data, **KNOBS)

# %%
notebook.curves(teacher)

# %% [markdown]
# The test images are looked at once, at the end:

# %%
notebook.figures(teacher)

# %% [markdown]
# What the network was shown in its first step:

# %%
notebook.views(teacher)

# %% [markdown]
# The whole report, with what was looked at how often and what differs from the recipe, is `report.html` in the run's
# folder. Next: a search for a better learning rate (3), or distilling at once (4).

# %%
teacher

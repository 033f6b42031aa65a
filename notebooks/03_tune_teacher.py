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
# It needs an accelerator. **After a session has ended, run the notebook again to resume**; an interrupted trial
# resumes from its last checkpoint.

# %% [markdown]
# On Kaggle or Colab, install funmatch first: remove the `#` and enter the path of its repository, cloned or among the
# inputs. On Colab, mount Google Drive, so that runs outlast the session. On Kaggle, add the output of the earlier
# session to the notebook's inputs.

# %%
# # %pip install -q "PATH_OF_FUNMATCH[tune]"

# %%
# from google.colab import drive; drive.mount("/content/drive")

# %% tags=["parameters"]
DATA = "pet37"  # or "flowers102", "food101"
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
study = place.runs / f"tune-teacher-{DATA}"
search = {"space": SPACE, "trials": TRIALS, "executions": EXECUTIONS, "patience": PATIENCE}
with place.session():
    funmatch.tune(TEACHER.format(DATA), out=study, data_dir=place.data, **search, **OPTIONS)

# %% [markdown]
# ## Results
#
# Every trial, the best first; the metrics of the best one, with the spread over its executions; and how often each
# split was evaluated.

# %%
notebook.searched(study)

# %% [markdown]
# To distil from the best run, set `TEACHER = "tune-teacher-{}"` in notebook 4.

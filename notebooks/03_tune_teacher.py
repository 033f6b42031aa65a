# %% [markdown]
# # 3 · A better teacher
#
# A search for the teacher's learning rate, as [FunMatch-Distillation](https://github.com/sayakpaul/FunMatch-Distillation)
# made it: at random among four values, three trials of two executions each, each ended when validation likes it no
# better for a while. Its best network came to 90.32 % on the test images of Pet37, its hand-tuned teacher to 90.92 %.
#
# Chosen is by the validation images alone; the test images are looked at once, by the best trial.
#
# It needs an accelerator. **Run the notebook again after a session's end, and it goes on where it was**: a trial that
# was cut off, from its last checkpoint.

# %% [markdown]
# On Kaggle or Colab, install funmatch first: take the `#` away, and name the folder of its repository, cloned or among
# the inputs. On Colab, mount Google Drive, where runs last longer than a session. On Kaggle, add the output of the
# earlier session to the notebook's inputs.

# %%
# # %pip install -q "PATH_OF_FUNMATCH[tune]"

# %%
# from google.colab import drive; drive.mount("/content/drive")

# %% tags=["parameters"]
DATA = "pet37"  # or "flowers102", "food101"
TEACHER = "tf-teacher-{}"  # the recipe; or "teacher-{}-r101x3", "teacher-{}", which search lr=log:3e-4..3e-2
SPACE = {}  # beside what the recipe searches, e.g. {"lr": "log:1e-5..3e-3", "weight_decay": "0,1e-5,1e-4"}
TRIALS = 3  # learning rates that are tried
EXECUTIONS = 2  # runs of each, with other seeds
PATIENCE = 3  # evaluations without an improvement after which a run ends
KNOBS = {}  # what is said beside the recipe, e.g. {"sampler": "tpe", "micro_batch": 32}

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
# Each trial is a run folder like any other, with its checkpoints: of BiT-R101x3 about 9 GB a run. A second process with
# the same call helps.

# %%
study = place.runs / f"tune-teacher-{DATA}"
search = {"space": SPACE, "trials": TRIALS, "executions": EXECUTIONS, "patience": PATIENCE}
with place.session():
    funmatch.tune(TEACHER.format(DATA), out=study, data_dir=place.data, **search, **KNOBS)

# %% [markdown]
# ## What came of it
#
# Every trial, the best first; the best one's figures, with the spread over its executions; and how often which images
# were looked at.

# %%
notebook.searched(study)

# %% [markdown]
# To distil from the best run, say `TEACHER = "tune-teacher-{}"` in notebook 4.

# %% [markdown]
# # 4 · The student
#
# Function matching: teacher and student see the very same crop, flipped and mixed; the student matches the teacher's
# probabilities; no label is used; and it goes on for long. A BiT-R50x1 learns from the teacher of notebook 2 or 3.
#
# | Pet37, 128 pixels, test top-1 | teacher | 300 epochs | 1,000 epochs |
# |---|---|---|---|
# | [the paper](https://arxiv.org/abs/2106.05237), table 4 | 91.03 | 82.75 | 88.01 |
# | [FunMatch-Distillation](https://github.com/sayakpaul/FunMatch-Distillation) | 90.92 | 81.3 | 86 |
#
# It needs an accelerator. **Run the notebook again after a session's end, and it goes on where it was.**

# %% [markdown]
# On Kaggle or Colab, install funmatch first: take the `#` away, and name
# the folder of its repository, cloned or among the inputs. On Colab, mount Google Drive, where runs last longer
# than a session. On Kaggle, add the outputs of notebook 2 and of the earlier session to the notebook's inputs.

# %%
# # %pip install -q PATH_OF_FUNMATCH

# %%
# from google.colab import drive; drive.mount("/content/drive")

# %% tags=["parameters"]
DATA = "pet37"  # or "flowers102", "food101"
TEACHER = "tf-teacher-{}"  # a run of notebook 2, or the search of notebook 3: "tune-teacher-{}"
STUDENTS = {"pet37": "tf-pet37-300", "flowers102": "tf-flowers102-1000", "food101": "tf-food101-100"}
KNOBS = {}  # what is said beside the recipe, e.g. {"epochs": 1000, "micro_batch": 128}
MEASURE = True  # how many hours it takes here, which takes some seconds

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
# The earlier project's settings; the paper's own are `pet37-fast` and so on, see `funmatch recipes`.

# %%
recipe = STUDENTS[DATA]
notebook.about(recipe, measure=MEASURE)

# %% [markdown]
# ## The run
#
# The teacher is judged on the validation images first, and refused near chance. Shortly before the session ends the
# run stops and saves.

# %%
teacher = place.run(TEACHER.format(DATA))
student = place.runs / recipe
with place.session():
    funmatch.recipe(recipe, out=student, teacher=teacher, data_dir=place.data, **KNOBS)

# %% [markdown]
# ## What teacher and student saw
#
# In step 0 and in step 1: another crop and another λ each time, and both see the same pixels.

# %%
notebook.views(student, step=0)

# %%
notebook.views(student, step=1)

# %% [markdown]
# ## Curves
#
# The dashed line is the teacher. A student that looks finished early is not: patience is half of the method.

# %%
notebook.curves(student)

# %% [markdown]
# ## Evaluation
#
# Agreement is the share of images on which the student's first class is the teacher's; KL, in nats, is how far its
# probabilities are from the teacher's; ECE is the error of its confidence.

# %%
notebook.figures(teacher, student)

# %%
notebook.judged(student, split="val", data_dir=place.data)

# %% [markdown]
# ## Anywhere else
#
# The finished student is a folder in timm's own layout. It needs no funmatch.

# %% tags=["raises-exception"]
model = timm.create_model(f"local-dir:{student / 'student'}", pretrained=True)
model.pretrained_cfg["input_size"], model.pretrained_cfg["mean"], model.num_classes

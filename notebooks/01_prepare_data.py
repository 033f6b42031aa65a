# %% [markdown]
# # 1 · The data
#
# The first of four notebooks about [function matching](https://arxiv.org/abs/2106.05237) on a small data set:
# **data**, a fine-tuned teacher, a search for a better one, and a student that reproduces the teacher's outputs.
#
# This notebook downloads the images, checks every file, and writes TFRecord shards in the format of
# [FunMatch-Distillation](https://github.com/sayakpaul/FunMatch-Distillation): 384 × 384 JPEGs, 128 per shard. The later
# notebooks do not need the shards; they are for TensorFlow or another machine.

# %% [markdown]
# On Kaggle (with *Internet* on) or Colab, install funmatch first: remove the `#` and enter the path of its
# repository, cloned or among the inputs. The host's own PyTorch and timm are kept if they are recent enough.

# %%
# # %pip install -q PATH_OF_FUNMATCH

# %% tags=["parameters"]
DATA = "pet37"  # or "flowers102", "food101"
SIDE = 384  # size of the images in the shards, pixels
SHARD_SIZE = 128  # images per shard

# %%
import funmatch
from funmatch import notebook

place = notebook.place(DATA)
place

# %% [markdown]
# ## The images
#
# Every file is read once. The table compares the number of images with the published one and lists sizes, unusual
# images (CMYK, transparency, rotation by EXIF, …), images that are in two splits, and files that cannot be decoded.
# If there is no validation split, a tenth of the training images is held out, selected by content.

# %%
notebook.facts(funmatch.prepare(DATA, data_dir=place.data))

# %%
notebook.samples(DATA, data_dir=place.data)

# %% [markdown]
# ## Shards
#
# `<split>/<split>_<data>-<shard>-<count>.tfrec` holds `tf.train.Example`s with `image` (JPEG) and `class` (int64).
# After an interruption, run the cell again: it resumes at the unfinished shard.

# %%
shards = place.shards / f"{DATA}-{SIDE}"
written = funmatch.prepare(DATA, data_dir=place.data, to="tfrecord", side=SIDE, shard_size=SHARD_SIZE, out=shards)
written["shards"][:3]

# %% [markdown]
# ## Read back
#
# Every checksum is verified. Resized to a square, the images have lost their aspect ratio. The earlier project
# trained on such images, so its recipes also evaluate on them.

# %%
notebook.facts(funmatch.prepare(f"tfrecord:{shards}/*/*.tfrec"))

# %%
notebook.samples(f"tfrecord:{shards}/*/*.tfrec")

# %% [markdown]
# # 1 · The data
#
# The first of four notebooks that tell the story of [function matching](https://arxiv.org/abs/2106.05237) on a small
# data set: **data**, a fine-tuned teacher, a search for a better one, and a student that becomes the same function.
#
# Here the images are fetched, every file is read and checked, and they are written as TFRecord shards in the form of
# [FunMatch-Distillation](https://github.com/sayakpaul/FunMatch-Distillation): 384 × 384 JPEGs, 128 a shard. The later
# notebooks do not need the shards; TensorFlow, or another machine, may.

# %% [markdown]
# On Kaggle (with *Internet* on) or Colab, install funmatch first: take the `#` away, and name the folder of its
# repository, cloned or among the inputs. The host's own PyTorch and timm are left as they are.

# %%
# # %pip install -q PATH_OF_FUNMATCH

# %% tags=["parameters"]
DATA = "pet37"  # or "flowers102", "food101"
SIDE = 384  # of the images in the shards, pixels
SHARD_SIZE = 128  # images

# %%
import funmatch
from funmatch import notebook

place = notebook.place(DATA)
place

# %% [markdown]
# ## What the images are
#
# Every file is read once: counts beside the published ones, sizes, odd kinds (CMYK, transparency, turned by EXIF, …),
# images that are in two splits, and files that cannot be decoded. A data set without a validation split gets one: a
# tenth of the training images, chosen by content.

# %%
notebook.facts(funmatch.prepare(DATA, data_dir=place.data))

# %%
notebook.samples(DATA, data_dir=place.data)

# %% [markdown]
# ## Shards
#
# `<split>/<split>_<data>-<shard>-<count>.tfrec`, each a row of `tf.train.Example`s with `image` (JPEG) and `class`
# (int64). Interrupted, it goes on with the shard where it was.

# %%
shards = place.shards / f"{DATA}-{SIDE}"
written = funmatch.prepare(DATA, data_dir=place.data, to="tfrecord", side=SIDE, shard_size=SHARD_SIZE, out=shards)
written["shards"][:3]

# %% [markdown]
# ## Read back
#
# Every checksum is verified. Resized to a square, the images have lost their aspect: that is how the earlier project
# saw them, and why its recipes evaluate on squashed images.

# %%
notebook.facts(funmatch.prepare(f"tfrecord:{shards}/*/*.tfrec"))

# %%
notebook.samples(f"tfrecord:{shards}/*/*.tfrec")

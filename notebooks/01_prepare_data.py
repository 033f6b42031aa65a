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
# On Kaggle (with *Internet* on) and Colab, the next cell installs funmatch from `SOURCE`.

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

# %% [markdown]
# ## Which images?
#
# `fashion-mini`, 2,700 small images, is part of funmatch: with it, every cell runs in minutes on a CPU and without a
# network. `pet37`, `flowers102` and `food101` are downloaded. For images of your own, enter a folder of
# `<split>/<class>/…` or `<class>/…`, such as `"/kaggle/input/flowers"`; without a `val` folder, a tenth of the training
# images is held out.

# %% tags=["parameters"]
DATA = "fashion-mini"  # embedded, minutes on a CPU; or "pet37", "flowers102", "food101", or a folder of your own
SIDE = None  # size of the images in the shards, pixels; None: 384, or 32 for the embedded images
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
# If there is no validation split, a tenth of the training images is held out; which ones depends on their content only.

# %%
notebook.facts(funmatch.prepare(**place.images))

# %%
notebook.samples(**place.images)

# %% [markdown]
# ## Shards
#
# `<split>/<split>_<data>-<shard>-<count>.tfrec` holds `tf.train.Example`s with `image` (JPEG) and `class` (int64).
# After an interruption, run the cell again: it resumes at the unfinished shard.

# %%
side = SIDE or place.choice.side
shards = place.shards / f"{place.name}-{side}"
written = funmatch.prepare(**place.images, to="tfrecord", side=side, shard_size=SHARD_SIZE, out=shards)
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

"""Tables that name images by their paths: the same data set as the same images in folders, and what cannot be used."""

import codecs
import csv
import os
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
from make_images import paint, write_few
from pyarrow import parquet

from funmatch.data.cache.open_cache import open_cache
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.dataset import UNLABELLED, ReadOptions
from funmatch.data.join import join_datasets
from funmatch.data.label_sets import sets_of
from funmatch.data.readers.folder import open_folder
from funmatch.data.readers.open import open_dataset, resolve_spec
from funmatch.data.remote import fetch
from funmatch.errors import InputError
from funmatch.shipping.sources.find import find_images


def rows_of(images) -> list[dict[str, str]]:
    """A row for each image of the folder that `images` makes, in an order that is not that of the folder."""
    paths = sorted((path for path in images.rglob("*") if path.is_file()), key=lambda path: (path.name, path))
    split_class = [path.relative_to(images).parts for path in paths]
    return [
        {"path": "/".join(parts), "label": parts[1], "split": parts[0]} for parts in split_class
    ]  # fmt: skip


def write(path, rows, **options) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return f"csv:{path}"


def text(path, content: str) -> str:
    path.write_bytes(content.encode())
    return f"csv:{path}"


@pytest.fixture(name="pets")
def two_images(tmp_path):
    """Two images in a folder: cat.png and dog.png."""
    for i, name in enumerate(("cat", "dog")):
        paint(tmp_path / f"{name}.png", i)
    return tmp_path


def contents(dataset) -> dict[str, list[tuple[bytes, str]]]:
    """The bytes and the class of every image."""
    return {
        name: [
            (dataset.read(name, i), dataset.classes[label] if label >= 0 else "") for i, label in enumerate(s.labels)
        ]
        for name, s in dataset.splits.items()
    }


def test_the_same_images_in_folders_are_the_same_data_set(images):
    spec = write(images / "all.csv", rows_of(images))
    folder, table = open_folder(images), open_dataset(spec)
    assert table.classes == folder.classes == ("ant", "bee", "cat")
    assert contents(table) == contents(folder)
    assert [table.splits[name].names for name in table.splits] == [folder.splits[name].names for name in folder.splits]
    # The key of the cache: runs on one resume on the other.
    assert open_cache(spec).key == open_cache(str(images)).key
    assert open_cache(spec).splits["val"].digests.tolist() == open_cache(str(images)).splits["val"].digests.tolist()


@pytest.mark.parametrize("kind", ["plain", "tabs", "semicolons", "quoted", "mark", "utf-16", "crlf", "cr", "parquet"])
def test_every_way_of_writing_the_same_table(images, kind):
    rows = rows_of(images)
    path = images / {"tabs": "t.tsv", "parquet": "t.parquet"}.get(kind, "t.csv")
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(
            path,
            rows,
            delimiter={"tabs": "\t", "semicolons": ";"}.get(kind, ","),
            quoting=csv.QUOTE_ALL if kind == "quoted" else csv.QUOTE_MINIMAL,
            lineterminator={"crlf": "\r\n", "cr": "\r"}.get(kind, "\n"),
        )
    if kind == "mark":
        path.write_bytes(codecs.BOM_UTF8 + b"sep=,\r\n" + path.read_bytes() + b",,\n\n")
    if kind == "utf-16":
        path.write_bytes(path.read_text().encode("utf-16"))
    assert contents(open_dataset(f"csv:{path}")) == contents(open_folder(images))
    # Without the prefix, too: a file of this name is no folder.
    assert contents(open_dataset(str(path))) == contents(open_folder(images))
    assert resolve_spec(str(path)) == f"csv:{path}"


def test_columns_are_found_by_usual_names_or_named(pets):
    found = open_dataset(
        text(pets / "a.csv", 'Species,File Name,Set,"a, b"\nx,cat.png,Training,1\ny,dog.png,valid,2\n')
    )
    assert found.classes == ("x", "y")
    assert {name: split.names for name, split in found.splits.items()} == {"train": ["cat.png"], "val": ["dog.png"]}
    spec = text(pets / "b.csv", "where,label,what,split\ncat.png,1,x,a\ndog.png,2,y,b\n")
    options = ReadOptions(image_feature="where", label_feature="what", split_column="none")
    assert open_dataset(spec, options).classes == ("x", "y")
    assert (
        open_dataset(spec, ReadOptions(image_feature="where", label_feature="none", split_column="none")).classes == ()
    )
    several = open_dataset(text(pets / "c.csv", "file,path,class,label\nx,cat.png,1,a\ny,dog.png,2,b\n"))
    assert several.classes == ("a", "b")
    assert "the path is read from path, not file; choose with --path-column" in several.notes[0]


def test_where_paths_lead(pets, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("lists")
    rows = f"path,label\n{pets}/cat.png,a\n~/dog.png,b\n"
    monkeypatch.setenv("HOME", str(pets))
    assert len(open_dataset(text(elsewhere / "a.csv", rows)).splits["train"]) == 2
    relative = text(elsewhere / "b.csv", "path,label\nsub\\..\\cat.png,a\n./dog.png,b\n")
    (pets / "sub").mkdir()
    found = open_dataset(relative, ReadOptions(image_root=pets))
    assert found.read("train", 0) == (pets / "cat.png").read_bytes()
    with pytest.raises(
        InputError, match=rf"2 of 2 images cannot be read; paths are relative to {elsewhere} \(--image-ro"
    ):
        open_dataset(relative)


def test_labels_are_numbers_or_names_as_in_shards(pets):
    numbers = text(pets / "n.csv", "path,label\ncat.png,2\ndog.png,1.0\n")
    found = open_dataset(numbers, ReadOptions(first_label=1))
    assert (found.classes, found.unnamed) == (("0", "1"), True)
    assert found.splits["train"].names == ["dog.png", "cat.png"]
    (pets / "names.txt").write_text("wolf\ndog\ncat\n")
    named = open_dataset(numbers, ReadOptions(class_file=pets / "names.txt"))
    assert named.classes == ("wolf", "dog", "cat")
    assert named.splits["train"].labels.tolist() == [1, 2]
    by_name = text(pets / "m.csv", "path,label\ndog.png,dog\ncat.png,cat\n")
    assert open_dataset(by_name, ReadOptions(class_file=pets / "names.txt")).splits["train"].labels.tolist() == [1, 2]
    assert open_dataset(by_name).classes == ("cat", "dog")


def test_without_labels_images_are_unlabelled(pets):
    found = open_dataset(text(pets / "a.csv", "path\ndog.png\ncat.png\n"))
    assert found.splits["train"].labels.tolist() == [UNLABELLED] * 2
    assert found.splits["train"].names == ["cat.png", "dog.png"]
    assert not found.notes
    note = open_dataset(text(pets / "b.csv", "path,kind\ndog.png,a\ncat.png,b\n")).notes[0]
    assert "b.csv has no column of labels, but: kind; its images are unlabelled unless --label-column names one" in note
    part = open_dataset(text(pets / "c.csv", "path,label,split\ndog.png,a,train\ncat.png,,test\n"))
    assert "no label in the rows of test, which is taken as unlabelled" in " ".join(part.notes)
    # A source beside one with labels may lack the column.
    options = ReadOptions(label_feature="label")
    joined = open_dataset([f"csv:{pets}/c.csv", text(pets / "d.csv", "path,split\ncat.png,val\n")], options)
    assert not joined.splits["val"].labelled


def test_rows_that_repeat_another_count_once(pets):
    found = open_dataset(text(pets / "a.csv", "path,label\ncat.png,x\ndog.png,y\n./cat.png,x\n"))
    assert found.splits["train"].names == ["cat.png", "dog.png"]
    assert "1 row that repeat another count once" in " ".join(found.notes)


ONE = "path,label\ncat.png,x\n"
REFUSED = {
    "empty": ("", {}, r"t\.csv is empty"),
    "no rows": ("path,label\n", {}, r"has no rows"),
    "header of an image": ("cat.png,x\ndog.png,y\n", {}, r"the first line \(cat\.png, x\) is of an image"),
    "no paths": ("a,label\ncat.png,x\n", {}, r"no column of paths, but: 'a', 'label'; name it by --path-column"),
    "unknown path": (ONE, {"image_feature": "pat"}, r"unknown column of \S+t\.csv 'pat'; did you mean 'path'"),
    "unknown label": (ONE, {"label_feature": "lable"}, r"'lable'; did you mean 'label'"),
    "unknown split": (ONE, {"split_column": "fold"}, r"unknown column .* 'fold'; known: label, path; --split-column"),
    "odd split": ("path,split\ncat.png,train\ndog.png,7\n", {}, r"line 3: the column 'split' has '7'; expected train"),
    "missing": (ONE + "a.png,x\nb.png,x\n", {}, r"2 of 3 images.*--on-bad skip:\n  line 3: \S+a\.png is missing\n"),
    "a folder": (ONE + ".,y\n", {}, r"line 3: \S+ is a folder"),
    "endings": ("path\ncat\ndog\n", {}, r"there is \S+cat\.png, so add the endings to the paths"),
    "lengths": (ONE + "dog.png\na,b,c\n", {}, r"2 rows of another length than the 2 col.*line 3 has 1, line 4 has 3"),
    "open quote": (ONE + '"dog.png,y\n', {}, r"line 3: unexpected end of data"),
    "contradiction": (ONE + "./cat.png,y\n", {}, r"x in train \(line 2\), y in train \(line 3\)"),
    "two splits": ("path,split\ncat.png,train\ncat.png,test\n", {}, r"no label in train \(line 2\), no label in test"),
    "two columns": ("path,label,label\ncat.png,x,y\n", {}, r"two columns 'label'; rename one"),
    "no path": (ONE + ",y\n", {}, r"line 3: the path is empty"),
    "address": (ONE + "https://a.b/c.jpg,y\n", {}, r"'https://a\.b/c\.jpg' is an address; download the images"),
    "several": (ONE + "dog.png,a; b\n", {}, r"line 3: the column 'label' has 2 labels, a, b .*--task multilabel"),
    "no label": (ONE + "dog.png,\n", {}, r"line 3: there is no label, though other rows of train .*1 such row"),
    "mixed": (ONE + "dog.png,3\n", {}, r"some labels are names, e\.g\. 'x', and 1 are numbers"),
    "no class": (ONE + "dog.png,0.5\n", {}, r"1 label of \S+ cannot be used:\n  line 3: the column 'label' is '0\.5'"),
    "outside": (ONE, {"class_file": "xx\nyy\n"}, r"outside the 2 names in \S+:\n  line 2: 'x' \(did you mean 'xx'\?"),
    "binary": ("path\0\n", {}, r"zero bytes"),
    "one-hot": ("path,a,b\ncat.png,1,0\ndog.png,1,2\n", {"label_feature": "a;b"}, r"line 3: the column 'b'.*has '2'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(pets, case):
    content, options, message = REFUSED[case]
    if "class_file" in options:
        (pets / "classes.txt").write_text(options["class_file"])
        options = {"class_file": pets / "classes.txt"}
    with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
        open_dataset(text(pets / "t.csv", content), ReadOptions(**options))


def test_other_refusals(pets):
    with pytest.raises(InputError, match=r"there is no file \S+none\.csv"):
        open_dataset(f"csv:{pets}/none.csv")
    with pytest.raises(InputError, match="expected a table that ends in"):
        open_dataset(f"csv:{pets}")
    parquet.write_table(pyarrow.table({"image": [b"x"]}), pets / "i.parquet")
    with pytest.raises(InputError, match=r"the column 'image' holds images, not paths of files; pass hf:\S+i\.parquet"):
        open_dataset(f"csv:{pets}/i.parquet")
    # Such a file without a prefix is one for the other reader, as before.
    with pytest.raises(InputError, match=r"for \*\.parquet, pass hf:"):
        open_dataset(f"{pets}/i.parquet")
    (pets / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is not a parquet file, or damaged"):
        open_dataset(f"csv:{pets}/broken.parquet")


def test_a_table_on_a_server_names_images_in_a_folder_here(pets, monkeypatch):
    address = "memory://tables/pets.csv"
    monkeypatch.setenv("FUNMATCH_ALLOW_ADDRESSES", address)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(InputError, match="relative to a folder here; pass it as --image-root"):
        open_dataset(f"csv:{address}")
    with pytest.raises(InputError, match=r"is not a folder of images; pass csv:memory://tables/pets\.csv"):
        open_dataset(address)
    (pets / "in").mkdir()
    shutil.copy(pets / "dog.png", pets / "in")
    options = ReadOptions(image_root=pets / "in")
    fsspec.filesystem("memory").pipe("/tables/pets.csv", b"path,label\ndog.png,d\n")
    assert open_dataset(f"csv:{address}", options).read("train", 0) == (pets / "dog.png").read_bytes()
    # Another one there since: looked up again, and it may not lead out of the folder.
    fsspec.filesystem("memory").pipe("/tables/pets.csv", b"path,label\n../cat.png,c\n")
    fetch._checked.clear()
    with pytest.raises(InputError, match=r"line 2: '\.\./cat\.png' leads out of --image-root"):
        open_cache(f"csv:{address}", options)


def test_missing_files_are_skipped_on_request_and_reported(pets):
    spec = text(pets / "a.csv", "path,label\ncat.png,x\ndog.png,y\nno.png,y\n")
    cache = open_cache(spec, ReadOptions(on_bad="skip"), CacheOptions(on_bad="skip"))
    assert len(cache.splits["train"]) == 2
    assert cache.summary["unreadable"] == [["no.png", "No such file or directory"]]
    # The same entry of the ledger is an error without it.
    with pytest.raises(InputError, match=r"no\.png: No such file or directory"):
        open_cache(spec, ReadOptions())


def test_names_that_are_not_utf8_are_files_and_no_classes(pets):
    shutil.copy(pets / "cat.png", os.fsencode(pets) + b"/\xe9.png")
    (pets / "a.csv").write_bytes(b"path,label\n\xe9.png,x\n")
    assert open_dataset(f"csv:{pets}/a.csv").read("train", 0) == (pets / "cat.png").read_bytes()
    (pets / "b.csv").write_bytes(b"path,label\ncat.png,caf\xe9\n")
    with pytest.raises(InputError, match="is not UTF-8; save the table in UTF-8"):
        open_dataset(f"csv:{pets}/b.csv")


SEVERAL = {
    "cells": "path,label,split\ncat.png,fur; tail;fur,train\ndog.png,,train\ncat2.png,ear,val\n",
    "columns": "path,split,fur,ear,tail,kg\ncat.png,train,1,0,1.0,7\ndog.png,train,0,0,,8\ncat2.png,val,0,true,0,9\n",
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_labels_of_an_image(pets, kind):
    shutil.copy(pets / "cat.png", pets / "cat2.png")
    found = open_dataset(text(pets / "a.csv", SEVERAL[kind]), ReadOptions(task="multilabel"))
    assert found.classes == ("ear", "fur", "tail")
    assert found.splits["train"].names == ["cat.png", "dog.png"]
    assert (sets_of(found, "train"), sets_of(found, "val")) == ([(1, 2), ()], [(0,)])
    # The cache has them, too.
    cache = open_cache(f"csv:{pets}/a.csv", ReadOptions(task="multilabel"))
    assert cache.splits["train"].labels(slice(None)).tolist() == [[0, 1, 1], [0, 0, 0]]


def test_several_labels_in_lists_of_parquet_and_with_another_separator(pets):
    parquet.write_table(pyarrow.table({"path": ["cat.png", "dog.png"], "labels": [["b", "a"], []]}), pets / "a.parquet")
    found = open_dataset(f"csv:{pets}/a.parquet", ReadOptions(task="multilabel"))
    assert (found.classes, sets_of(found, "train")) == (("a", "b"), [(0, 1), ()])
    bars = text(pets / "b.csv", "path,label\ncat.png,2|0\ndog.png,1\n")
    found = open_dataset(bars, ReadOptions(task="multilabel", label_separator="|"))
    assert (found.classes, sets_of(found, "train")) == (("0", "1", "2"), [(0, 2), (1,)])


def test_one_of_several_columns_is_the_class(pets):
    spec = text(pets / "a.csv", "image,b,a\ncat.png,1.0,0.0\ndog.png,0.0,1.0\n")
    found = open_dataset(spec, ReadOptions(label_feature="b;a"))
    assert found.classes == ("a", "b")
    assert found.splits["train"].names == ["dog.png", "cat.png"]


def test_names_of_images_are_found_by_predict(pets, monkeypatch):
    text(pets / "a.csv", "path\ncat.png\nno.png\n")
    monkeypatch.chdir(pets)
    options = ReadOptions(unlabelled=True, on_bad="skip")
    assert [image.path for image in find_images(["csv:a.csv"], options).images] == ["cat.png", "no.png"]
    monkeypatch.chdir(pets.parent)
    assert next(find_images([f"{pets.name}/a.csv"], options).images).path == f"{pets.name}/cat.png"


def test_a_table_of_many_rows_is_listed_quickly(pets):
    """Linear, and without a look at the disk but one for each file: 20,000 rows in well under a second."""
    for i in range(20):
        shutil.copy(pets / "cat.png", pets / f"{i}.png")
    rows = "".join(f"{i % 20}.png,{i % 20 % 7}\n" for i in range(20_000))
    found = open_dataset(text(pets / "a.csv", "path,label\n" + rows))
    assert np.bincount(found.splits["train"].labels).tolist() == [3, 3, 3, 3, 3, 3, 2]
    assert "19,980 rows that repeat another count once" in " ".join(found.notes)


@pytest.mark.slow
def test_a_run_on_a_table_is_the_run_on_the_same_folders(tmp_path, funmatch):
    """The same weights, bit by bit, and a run on the folders is known as one on the table."""
    few = Path(write_few(2, 4))
    rows = [
        {"file": str(path), "class": path.parent.name, "subset": path.parent.parent.name}
        for path in sorted(few.rglob("*.png"), key=lambda path: (path.name, path))
    ]
    table = write(tmp_path / "few.csv", rows)
    words = ("--student", "fashion-mini-student", "--batch", "8", "--steps", "4")
    for name, data in (("folders", few), ("table", table)):
        funmatch("train", "--data", data, *words, "--out", name)
    assert weights(tmp_path / "table") == weights(tmp_path / "folders")
    assert "finished" in funmatch("train", "--data", table, *words, "--out", "folders").stderr


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


def test_two_tables_are_joined(pets):
    one = open_dataset(text(pets / "a.csv", "path,label,split\ncat.png,x,train\n"))
    other = open_dataset(text(pets / "b.csv", "path,label,split\ndog.png,y,val\n"))
    joined = join_datasets([one, other])
    assert (joined.classes, list(joined.splits)) == (("x", "y"), ["train", "val"])

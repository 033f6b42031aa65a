"""Checks that every command, example and link in the README, in `docs/` and in CONTRIBUTING works."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from make_images import paint
from PIL import Image
from test_bit import as_second_layout, random_bit
from test_clip import VIT, write_open_clip

from funmatch.cli import parse
from funmatch.commands.study.spec import parse as parse_study
from funmatch.commands.verbs import TABLES
from funmatch.config import PLANNED, SEARCHED, Distill

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
"""The README first: commands of later pages use the runs that its commands write."""
LINKING = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").rglob("*.md"))]
"""Also pages without commands to run: their benchmarks take hours."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(language: str, pages: Iterable[Path] = PAGES) -> list[str]:
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)]


def lines_with(word: str, pages: Iterable[Path] = PAGES) -> list[str]:
    return [line for block in blocks("sh", pages) for line in block.splitlines() if line.startswith(f"{word} ")]


COMMANDS = list(dict.fromkeys(lines_with("funmatch")))
(CONFIG,) = [text for text in blocks("toml") if "[[run]]" not in text]
SHOW_AND_EXIT = ("--help", "--help-all", "--print-completion")
TARGETS = sorted({line.split()[1] for line in lines_with("make")})


def arguments(command: str) -> tuple[list[str], str | None]:
    """Arguments of a command line, and the file to which `>` sends its output; what follows a pipe is left out."""
    words = shlex.split(command.partition(" | ")[0])[1:]
    return (words[:-2], words[-1]) if ">" in words else (words, None)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_commands_are_found_in_the_pages():
    assert len(lines_with("funmatch", PAGES[:1])) >= 4
    assert len(lines_with("make", PAGES[:1])) == 2
    assert len(COMMANDS) >= 25


def test_readme_is_short_and_links_every_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    for contents in (ROOT / "README.md", ROOT / "docs" / "README.md"):
        linked = {(contents.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+\.md)", contents.read_text())}
        assert not {page for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"} - linked


@pytest.fixture
def config_files(tmp_path, monkeypatch) -> None:
    """A current folder with the configuration files that commands name, since parsing reads them."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(CONFIG)
    Path("runs/first/student").mkdir(parents=True)  # a finished run
    shutil.copy(ROOT / "tests" / "fixtures" / "old_run" / "config.json", "runs/first")


@pytest.mark.usefixtures("config_files")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_parsed(command):
    words, _ = arguments(command)
    if any(word in SHOW_AND_EXIT for word in words):
        with pytest.raises(SystemExit) as end:
            parse(words)
        assert end.value.code == 0
    else:
        parse(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_mentioned_exists(page):
    """Options in inline code that begins with `--` or `funmatch`; other programs have options of their own."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    code = [span for span in re.findall(r"`([^`]+)`", text) if span.startswith(("--", "funmatch "))]
    tables = [*TABLES.values(), *SEARCHED.values(), *PLANNED.values()]
    for flag in {flag for span in code for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}:
        known = flag in SHOW_AND_EXIT or any(table.field_of(flag.replace("--no-", "--")) for table in tables)
        assert known, f"{flag} is not an option"
    for verb in {span.split()[1] for span in code if span.startswith("funmatch ")}:
        assert verb in TABLES or verb in ("COMMAND", "--print-completion"), f"{verb} is not a command"


@pytest.mark.parametrize("text", [text for text in blocks("toml") if "[[run]]" in text])
def test_every_study_is_valid(text):
    assert len(parse_study(text, "README.md").entries) > 1


def test_the_configuration_file_is_valid():
    Distill.checked(**tomllib.loads(CONFIG), out="runs/from-file")


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_every_file_that_is_mentioned_exists(page):
    text = page.read_text()
    for path in re.findall(r"`([\w/-]+\.md|(?:funmatch|scripts|tests)/[\w/.-]+)`", text):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path
    for path, _, anchor in (link.partition("#") for link in re.findall(r"\]\(((?!http)[^)]+)\)", text)):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
    for script, options in re.findall(r"python ((?:benchmarks|scripts)/\w+\.py)([^`|>\n]*)", text):
        source = (ROOT / script).read_text()
        for flag in re.findall(r"(?<!\S)--[a-z-]+", options):
            assert f'"{flag}"' in source, f"{script} has no option {flag}"


def edited_config(written: Path, images: Path) -> str:
    """The page's configuration file with small values; every option in it must be in the written template."""
    options = tomllib.loads(CONFIG)
    assert all(re.search(rf"^#? ?{name} = ", written.read_text(), re.M) for name in options)
    small = {"data": str(images), "student": "resnet10t", "side": 32, "epochs": 1, "allow_weak_teacher": True}
    small["student_kwargs"] = ["channels=8,8,16,16", "stem_width=8"]
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in (options | small).items())


SMALL = {
    "resnetv2_101x1_bit.goog_in21k": "resnet10t --model-kwargs channels=8,8,16,16 stem_width=8 --steps 2",
    "--teacher runs/teacher": "--teacher runs/teacher --allow-weak-teacher",
    "--teacher runs/tags": "--teacher runs/tags --allow-weak-teacher",
    "--student resnetv2_50x1_bit": "--student resnet10t --student-kwargs channels=8,8,16,16 stem_width=8",
    "--side 128": "--side 32",
    "--epochs 1000": "--epochs 1",
}
"""What makes the README's commands short: small networks, few steps."""


def test_the_readmes_lines_work_in_their_order(images, tmp_path, funmatch, capsys, monkeypatch):
    """From a folder of images to a class name: seven commands, and the lines of Python that use the student."""
    monkeypatch.chdir(tmp_path)
    lines = lines_with("funmatch", PAGES[:1])
    assert [line.split()[1] for line in lines] == [
        "data",
        "finetune",
        "distill",
        "train",
        "evaluate",
        "predict",
        "report",
    ]
    for line in lines:
        for old, new in ({"~/images": str(images)} | SMALL).items():
            line = line.replace(old, new)
        done = funmatch(*arguments(line)[0])
        assert done.returncode == 0, done.stderr
    assert Path("comparison.html").is_file()
    Image.new("RGB", (50, 40), "red").save("photo.jpg")
    (code,) = blocks("python", PAGES[:1])
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip() in ("ant", "bee", "cat")


@pytest.mark.slow
def test_every_command_runs_on_small_images(images, tmp_path, funmatch):
    """Every command, with a small network in place of BiT, few epochs, and a teacher from `train`."""
    np.savez(tmp_path / "bit.npz", **as_second_layout(random_bit(50, 1)))
    for number in range(8):  # calibration needs 16 training images
        paint(images / "train" / "bee" / f"more-{number}.jpg", 50 + number)
    tiny = timm.create_model("resnet10t", channels=(8, 8, 16, 16), stem_width=8).state_dict()
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    torch.save({"state_dict": tiny, "state_dict_ema": tiny}, tmp_path / "checkpoint.pth.tar")
    replacements = {
        "import resnet50 --weights checkpoint.pth.tar --model-kwargs": f"import resnet10t --weights "
        f"{tmp_path}/checkpoint.pth.tar --model-kwargs channels=8,8,16,16 stem_width=8",
        "--student resnetv2_50x1_bit --student mobilenetv3_large_100": "--student resnet10t --student resnet14t "
        "--student-kwargs channels=8,8,16,16 stem_width=8",
        "funmatch demo": "funmatch demo --steps 20",
        "--step 1200": "--step 1",
        "clip:ViT-B-32/laion2b_s34b_b79k": f"clip:{write_open_clip(tmp_path / 'clip', VIT)}",
        "--teacher heads/photos --student resnet18 --epochs 300": "--teacher heads/photos --student resnet10t "
        "--student-kwargs channels=8,8,16,16 stem_width=8 --side 32 --epochs 1 --allow-weak-teacher",
        "--model resnet50.a1_in1k": "--model runs/labels",
        "--classes-from names.txt": f"--classes-from {tmp_path}/names.txt",
        "keras savedmodel tflite": "torch-export",  # without TensorFlow, which the slow tests of exports need
        "--trials 20": "--trials 2",
        "recipes pet37-fast": "recipes flowers102-fast --no-measure",
        "distill pet37-fast": "recipes sun397-fast --no-measure",
        **{
            name: SMALL[name]
            for name in ("resnetv2_101x1_bit.goog_in21k", "--teacher runs/teacher", "--teacher runs/tags")
        },
        "pets_teacher_savedmodel": f"{tmp_path}/bit.npz",
        "--teachers runs/a runs/b": "--teachers runs/labels runs/labels",
        "--teacher runs/a --teacher runs/b": "--teacher runs/labels --teacher runs/labels --allow-weak-teacher",
        "--teacher-side 224 384": "--teacher-side 32 48",
        "--side 160": "--side 32",
        "~/images": str(images),
        "gs://my-bucket/images": str(images),
        "~/any-photos": f"{images}/train",
        "pet37": str(images),
        "pets.safetensors": "teacher.safetensors",
        "--report benchmark.html": "--report benchmark.html --max-seconds 1 --no-memory",
        "--formats eager,onnx": "--formats eager,onnx --max-seconds 1",
        **{name: SMALL[name] for name in ("--student resnetv2_50x1_bit", "--side 128", "--epochs 1000")},
        "--epochs 3000": "--epochs 3",
        "study consistency": "study consistency --set steps=2 --only same/ic --seeds 0",
        "--teacher resnetv2_101x1_bit": "--teacher resnet10t --teacher-kwargs channels=8,8,16,16 stem_width=8 "
        "--allow-weak-teacher",
        "--teacher-weights teacher.safetensors": f"--teacher-weights {tmp_path}/runs/labels/student/model.safetensors",
    }
    # Teachers are needed by the other commands.
    teachers_first = sorted(COMMANDS, key=lambda line: not line.startswith(("funmatch train", "funmatch finetune")))
    for command in teachers_first:
        for old, new in replacements.items():
            command = command.replace(old, new)
        # Nothing is trained, so a teacher may be as weak as it is.
        if command.startswith(("funmatch predict", "funmatch select")):
            command = command.replace(" --allow-weak-teacher", "")
        # Several pages export the same run, each as if it were the first.
        if command.startswith("funmatch export") and "--out" not in command:
            command += " --overwrite"
            if "--quantize 8" in command:  # of nine images INT8 may lose one
                command += " --max-drop 100"
        words, output = arguments(command)
        result = funmatch(*words)
        if output:
            (tmp_path / output).write_text(result.stdout)
        if output == "run.toml":  # a reader edits the template; the page shows the lines that are kept
            (tmp_path / output).write_text(edited_config(tmp_path / output, images))
    assert (tmp_path / "runs" / "first" / "report.html").exists()


@pytest.mark.slow
def test_python_examples_run(tmp_path):
    for code in blocks("python"):
        if "runs/first" not in code:
            subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=os.environ, check=True)

"""Networks of image and text against the libraries that they come from, on the same image files."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lazy_module import LazyModule
from make_images import paint
from PIL import Image
from safetensors.torch import load_file, save_file

from funmatch.errors import InputError
from funmatch.models.clip import names, templates
from funmatch.models.clip.class_texts import ClassTexts, read_class_texts
from funmatch.models.load import load
from funmatch.models.save import save
from funmatch.training.student.trained_model import open_trained_model

open_clip = LazyModule("open_clip")

NAMES = ["ant", "bumble bee", "cat"]
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TOWERS = {
    "vit": VIT,
    "quick": VIT,
    "squash": VIT,
    "mean": VIT | {"no_ln_pre": True, "final_ln_after_pool": True, "pool_type": "avg", "ls_init_value": 0.1,
                   "mlp_ratio": 2.57},
    "late-mean": VIT | {"pool_type": "avg"},
    "resnet": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "head_width": 64},
    "timm": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160},
    "linear": {"timm_model_name": "test_efficientnet", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
    "mlp": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "mlp", "image_size": 160},
    "attention": VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "norms": VIT | {"qk_norm": True},
    "siglip": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
}  # fmt: skip


SIGLIP = {"custom_text": True, "init_logit_bias": -10}
"""What a SigLIP of OpenCLIP has beside its towers."""


def write_open_clip(
    folder: Path, vision: dict, *, quick_gelu: bool = False, more: dict | None = None, **preprocess
) -> Path:
    """A folder of a random network in OpenCLIP's layout."""
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    if more:
        text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    model = {"embed_dim": 64 if more else 24, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    model |= more or {}
    folder.mkdir(parents=True)
    config = {"model_cfg": {**model}, "preprocess_cfg": PREPROCESS | preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    build = open_clip.CustomTextCLIP if model.pop("custom_text", False) else open_clip.CLIP
    net = build(**model)
    for parameter in net.parameters():
        # What starts at 0 or 1 would hide that it is in the wrong place.
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    save_file(
        {name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> list[Path]:
    """Files of several formats and sizes, none of them square."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, size in enumerate(((90, 130), (200, 61), (110, 90))):
        paint(folder / f"{number}.jpg", number, size)
    return sorted(folder.iterdir())


def texts_of(names_: list[str], sentences: tuple[str, ...]) -> ClassTexts:
    return ClassTexts(tuple(names_), tuple(tuple(s.replace("{}", n) for s in sentences) for n in names_), "the test")


def logits_of(name: str, files: list[Path], texts: ClassTexts | None = None) -> torch.Tensor:
    """What our classifier answers for image files, seen as it says itself."""
    model = open_trained_model(name, texts=texts)
    images = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files]
    with torch.inference_mode():
        return model.classifier(torch.stack([model.preprocessing.view(image) for image in images]))


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def reference(folder: Path, files: list[Path], class_names: list[str], sentences) -> torch.Tensor:
    """The logits by OpenCLIP alone, as its own examples compute them."""
    net, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    head = open_clip.build_zero_shot_classifier(net.eval(), tokenizer, class_names, sentences)
    with torch.inference_mode():
        found = net.encode_image(torch.stack([preprocess(Image.open(file)) for file in files]), normalize=True)
        bias = 0 if net.logit_bias is None else net.logit_bias
        return net.logit_scale.exp() * found @ head + bias


QUICK = ("vit", "squash")
"""The others take seconds each."""


@pytest.mark.parametrize(
    "tower", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in TOWERS]
)
def test_logits_are_those_of_open_clip(tower, tmp_path, photographs):
    quick, mode = tower == "quick", "squash" if tower == "squash" else "shortest"
    more = SIGLIP if tower == "siglip" else None
    folder = write_open_clip(tmp_path / "clip", TOWERS[tower], quick_gelu=quick, more=more, resize_mode=mode)
    expected = reference(folder, photographs, NAMES, open_clip.SIMPLE_IMAGENET_TEMPLATES)
    texts = texts_of(NAMES, templates.SHORT)
    ours = logits_of(f"clip:{folder}", photographs, texts)
    assert_equal(ours, expected)
    # Saved, it needs neither texts nor OpenCLIP's text tower.
    classifier = load(f"clip:{folder}", texts=texts)
    (tmp_path / "saved").mkdir()
    save(classifier, tmp_path / "saved", card=classifier.card, about={})
    again = load(str(tmp_path / "saved"))
    assert again.card.classes == tuple(NAMES)
    assert again.card.squash == (tower == "squash")
    assert torch.equal(logits_of(str(tmp_path / "saved"), photographs), ours)


def test_templates_are_those_of_open_clip():
    assert list(templates.OPENAI_80) == [each("{}") for each in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert list(templates.SHORT) == [each("{}") for each in open_clip.SIMPLE_IMAGENET_TEMPLATES]


@pytest.fixture(scope="module", name="clip")
def small_network(tmp_path_factory) -> Path:
    return write_open_clip(tmp_path_factory.mktemp("models") / "clip", VIT)


def test_logits_are_equal_if_the_layer_of_texts_was_stored(clip, tmp_path, monkeypatch):
    texts = texts_of(NAMES, ("{}", "a {}"))
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    first = load(f"clip:{clip}", texts=texts)
    stored = [*(tmp_path / "cache" / "texts").iterdir()]
    assert len(stored) == 1
    stored[0].write_bytes(stored[0].read_bytes()[:-50])  # damaged: read again
    again = load(f"clip:{clip}", texts=texts)
    assert torch.equal(again.net.head.weight, first.net.head.weight)
    assert again.content == first.content
    other = load(f"clip:{clip}", texts=texts_of([*NAMES[:2], "dog"], ("{}", "a {}")))
    assert other.content != first.content


def test_without_classes_the_outputs_are_embeddings(clip, photographs, tmp_path):
    net, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    with torch.inference_mode():
        expected = net.eval().encode_image(
            torch.stack([preprocess(Image.open(f)) for f in photographs]), normalize=True
        )
    assert_equal(logits_of(f"clip:{clip}", photographs), expected)
    classifier = load(f"clip:{clip}")
    (tmp_path / "saved").mkdir()
    save(classifier, tmp_path / "saved", card=classifier.card, about={})
    assert_equal(logits_of(str(tmp_path / "saved"), photographs), expected)
    student = load(f"clip:{clip}", classes=5)
    assert student.num_classes == 5
    assert not student.net.head.weight.any()


def test_names_of_open_clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RN50").mkdir()
    expected = names.ClipName("ViT-B-32", "laion2b_s34b_b79k")
    for word in ("ViT-B-32/laion2b_s34b_b79k", "ViT-B-32:laion2b_s34b_b79k", "ViT-B/32:laion2b_s34b_b79k"):
        assert names.parse(f"clip:{word}") == expected
    assert names.parse("clip:RN50") == names.ClipName("RN50")
    assert names.parse("clip:./RN50").folder == Path("RN50")
    assert names.parse("clip:hf-hub:user/model") == names.ClipName(repository="user/model")
    assert names.absolute("clip:./RN50") == f"clip:{tmp_path / 'RN50'}"
    assert names.absolute("clip:RN50") == "clip:RN50"
    with pytest.raises(InputError, match="names no model; expected one of OpenCLIP"):
        names.parse("clip:")
    with pytest.raises(InputError, match=r"unknown model of OpenCLIP 'ViT-B-31'; did you mean 'ViT-B-32'"):
        names.parse("clip:ViT-B-31/openai")
    with pytest.raises(InputError, match=r"pass clip:hf-hub:openai/clip-vit-base-patch32"):
        names.parse("clip:openai/clip-vit-base-patch32")
    with pytest.raises(InputError, match=r"architecture without weights; add a tag \(openai, .* or a file of weights"):
        load("clip:RN50")
    with pytest.raises(InputError, match=r"unknown tag of RN50 'opanai'; did you mean 'openai'"):
        load("clip:RN50/opanai")


def test_weights_in_a_file_of_an_architecture(clip, tmp_path, monkeypatch):
    config = json.loads((clip / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "ViT-tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(names, "architectures", lambda: ["ViT-tiny"])
    open_clip.add_model_config(tmp_path / "ViT-tiny.json")
    net = open_clip.create_model(f"local-dir:{clip}")
    # As OpenCLIP's training saves it.
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.pt")
    head = texts_of(NAMES, ("{}",))
    found, expected = load("clip:ViT-tiny", weights=tmp_path / "w.pt", texts=head), load(f"clip:{clip}", texts=head)
    assert torch.equal(found.net.head.weight, expected.net.head.weight)
    assert found.card.mean == open_clip.OPENAI_DATASET_MEAN
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"cannot load clip:ViT-tiny"):
        load("clip:ViT-tiny", weights=tmp_path / "bad.pt")
    with pytest.raises(InputError, match="has its own weights"):
        load(f"clip:{clip}", weights=tmp_path / "w.pt")


def test_a_configuration_that_asks_for_code_is_refused(clip, tmp_path):
    config = json.loads((clip / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"trust_remote_code": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"asks for code that comes with the model to be run \(trust_remote_code\)"):
        load(f"clip:{tmp_path}")


def test_code_of_a_repository_is_not_run(clip, tmp_path):
    """That of a tokenizer beside the weights, and of a text model of transformers that the configuration names."""
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\nC = M = T = object\n")
    code = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    for file in ("config.json", "tokenizer_config.json"):
        (folder / file).write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    config = json.loads((clip / "open_clip_config.json").read_text())
    for entries in ({"hf_tokenizer_name": "x/y"}, {"hf_model_name": str(folder), "hf_tokenizer_name": "x/y"}):
        changed = {**config["model_cfg"], "text_cfg": config["model_cfg"]["text_cfg"] | entries}
        (folder / "open_clip_config.json").write_text(json.dumps(config | {"model_cfg": changed}))
        with pytest.raises(InputError, match="it needs code of its repository, which is never run"):
            load(f"clip:{folder}", texts=texts_of(NAMES, ("{}",)))
        assert not (tmp_path / "run").exists()


def test_weights_that_are_missing_are_not_random(clip, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((clip / "open_clip_config.json").read_text())
    with pytest.raises(InputError, match=f"cannot load clip:{tmp_path}"):
        load(f"clip:{tmp_path}")
    # A part of them, or with objects beside them.
    tensors = load_file(clip / "open_clip_model.safetensors")
    save_file(
        {key: each for key, each in tensors.items() if key != "visual.proj"}, tmp_path / "open_clip_model.safetensors"
    )
    with pytest.raises(InputError, match=r'Missing key\(s\) in state_dict: "visual.proj"'):
        load(f"clip:{tmp_path}")
    (tmp_path / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": tensors, "path": tmp_path}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="its weights hold more than tensors; where it was made, save"):
        load(f"clip:{tmp_path}")


def test_long_names_are_refused_and_named(clip):
    texts = texts_of(["ant", "a very " * 12 + "long name", "a rather " * 15 + "long name"], ("{}", "a photo of a {}."))
    match = (
        r"reads at most 24 tokens of a text, but 2 of 3 classes of the test need more: 'a very .*' has 33 in 'a photo"
    )
    with pytest.raises(InputError, match=match):
        load(f"clip:{clip}", texts=texts)


def test_class_names_from_files(tmp_path):
    def read(name: str, content: str, sentences: str | None = None) -> ClassTexts:
        (tmp_path / name).write_text(content)
        return read_class_texts(str(tmp_path / name), sentences)

    found = read("names.txt", "ant\n\n bumble_bee \n", "short")
    assert found.names == ("ant", "bumble_bee")
    assert found.texts[1][0] == "itap of a bumble bee."
    assert len(read("names.txt", "ant\nbee\n").texts[0]) == 80
    assert read("list.json", '["ant", "bee"]', "none").texts == (("ant",), ("bee",))
    found = read("descriptions.json", '{"ant": ["a small insect", "six legs"], "bee": "it makes honey"}')
    assert found.texts == (("a small insect", "six legs"), ("it makes honey",))
    (tmp_path / "own.txt").write_text("a {}, the {}\n")
    assert read("names.txt", "ant\nbee", str(tmp_path / "own.txt")).texts[0] == ("a ant, the ant",)
    assert read_class_texts("data", "none", ["my_ant", "bee"]).texts == (("my ant",), ("bee",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names.txt is empty"),
        ("ant\n", "has 1 class names; a classifier needs at least two"),
        ("ant\nbee\nant\n", "has 'ant' more than once"),
        ("my ant\nbee\nmy_ant\n", "my ant and my_ant would be read as the same text"),
    ],
)
def test_class_names_that_make_no_classifier(content, message, tmp_path):
    (tmp_path / "names.txt").write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_class_texts(str(tmp_path / "names.txt"))


def test_templates_without_a_place_are_refused(tmp_path):
    (tmp_path / "own.txt").write_text("a photo of a {}\na photo\n")
    with pytest.raises(InputError, match=r"1 of 2 templates have no {} for the class name, the first is 'a photo'"):
        templates.read_templates(str(tmp_path / "own.txt"))
    with pytest.raises(InputError, match="cannot read the templates in nothing"):
        templates.read_templates("nothing")
    with pytest.raises(InputError, match="pass a file with names"):
        read_class_texts("data", None, None)


def test_the_extra_that_is_missing_is_named(clip, monkeypatch):
    monkeypatch.setattr(names, "has_open_clip", lambda: False)
    monkeypatch.setattr(names, "architectures", list)
    with pytest.raises(InputError, match=r"names of OpenCLIP need pip install 'funmatch\[clip\]'"):
        names.parse("clip:ViT-B-32/openai")
    with pytest.raises(InputError, match=r"of OpenCLIP, which is not installed: pip install 'funmatch\[clip\]'"):
        load(f"clip:{clip}")

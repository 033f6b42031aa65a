"""Networks of transformers: logits, features and students are those of the library itself; bad folders are named."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformer_families import FAMILIES, QUICK, VIT, WHOLE, write, write_net

import funmatch
from funmatch.errors import InputError
from funmatch.models.classifier import fingerprint
from funmatch.models.inference.features import Features, is_headless
from funmatch.models.inference.frozen import Frozen, InferenceMode
from funmatch.models.load import load
from funmatch.models.save import save
from funmatch.shipping.sources.files import Decoding, one_file
from funmatch.training.student.trained_model import open_trained_model

SIZES = [(320, 211), (120, 120), (301, 203), (191, 230), (97, 143)]
"""Widths and heights of photographs: wide, square and high, also of odd lengths."""


@pytest.fixture(autouse=True)
def silent():
    """Transformers reports what it saves; a test's output should show what fails."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(level)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> list[str]:
    """JPEG files of the two photographs that scikit-learn comes with."""
    spec = importlib.util.find_spec("sklearn")
    assert spec
    assert spec.origin
    found = Path(spec.origin).parent / "datasets" / "images"
    folder, paths = tmp_path_factory.mktemp("photographs"), []
    for number, size in enumerate(SIZES):
        with Image.open(found / ("china.jpg", "flower.jpg")[number % 2]) as photo:
            photo.resize(size).save(folder / f"{number}.jpg", quality=93)
        paths.append(str(folder / f"{number}.jpg"))
    return paths


@torch.no_grad()
def logits_of_pipeline(folder: Path, path: str, *, quick: bool) -> torch.Tensor:
    """The logits that transformers' own pipeline computes from a file."""
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    net = getattr(transformers, name).from_pretrained(folder)
    # By Pillow: torchvision's resizing of bytes rounds some pixels to the next grey level.
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    if quick:  # what the pipeline does, without importing those of all other tasks
        photo = transformers.image_utils.load_image(path)
        return net(**processor(images=photo, return_tensors="pt")).logits
    pipeline = transformers.pipeline("image-classification", model=net, image_processor=processor, device="cpu")
    return pipeline.forward(pipeline.preprocess(path))["logits"]


@torch.no_grad()
def our_logits(folder: Path, path: str) -> torch.Tensor:
    model = open_trained_model(str(folder))
    pixels = torch.from_numpy(one_file(path).pixels(Decoding(cap=model.cap)).copy())
    return model.classifier(model.preprocessing.view(pixels)[None])


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_logits_are_those_of_transformers_pipeline(name, tmp_path, photographs):
    folder = write(name, tmp_path / name)
    how = open_trained_model(str(folder)).preprocessing
    for path in photographs if name not in QUICK else photographs[:4:3]:
        expected, found = logits_of_pipeline(folder, path, quick=name in QUICK), our_logits(folder, path)
        with Image.open(path) as photo:
            high = photo.height > photo.width
        # Of high images that become squares, Pillow 13 resizes columns first: some pixels are a grey level off.
        bound = 2e-2 if how.squash and high else 1e-5
        assert (found - expected).abs().max() <= bound * expected.abs().max(), (path, found, expected)


def test_normalisation_of_efficientnet_is_folded_into_mean_and_deviation(tmp_path):
    card = load(str(write("efficientnet", tmp_path))).card
    # ((byte / 127.5 − 1) − 0.5) / 0.5 / 0.5
    assert card.mean == pytest.approx([0.75] * 3)
    assert card.std == pytest.approx([0.125] * 3)


@pytest.mark.slow
def test_torchvisions_pixels_are_at_most_a_grey_level_off(tmp_path, photographs):
    import transformers

    folder = write("mobilenet_v1", tmp_path)
    how = open_trained_model(str(folder)).preprocessing
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert processor.backend == "torchvision"
    for path in photographs:
        pixels = torch.from_numpy(one_file(path).pixels(Decoding(cap=512)).copy())
        with Image.open(path) as photo:
            expected = processor(images=photo, return_tensors="pt", do_normalize=False)["pixel_values"][0]
        assert (255 * (how.view(pixels) - expected)).abs().max() < 1.01


def test_class_names_come_with_the_network(tmp_path):
    names = dict(enumerate("abcde"))
    model = load(str(write("vit", tmp_path / "named", id2label=names, label2id={})))
    assert model.card.classes == tuple("abcde")
    assert load(str(write("vit", tmp_path / "numbered"))).card.classes is None


@pytest.mark.parametrize("name", ["vit", pytest.param("deit-distilled", marks=pytest.mark.slow)])
def test_a_frozen_network_computes_the_same(name, tmp_path):
    folder = write(name, tmp_path)
    views = torch.rand(3, 3, 32, 32)
    expected = Frozen(load(str(folder)))(views)
    torch.testing.assert_close(Frozen(load(str(folder)), InferenceMode())(views), expected)
    rounded = Frozen(load(str(folder)), InferenceMode(precision="bf16"))(views)
    assert (rounded - expected).abs().max() < 0.05 * expected.abs().max() + 0.02


class PowerLoss(Exception):
    """Stands for a power loss."""


def lose_power(*_):
    raise PowerLoss


def test_a_student_is_read_by_transformers_and_resumes_to_the_bit(tmp_path, images, monkeypatch):
    import transformers

    folder = write("vit", tmp_path / "vit")
    options = {"data": str(images), "student": str(folder), "side": 32, "batch": 4, "device": "cpu", "val": "none"}
    run = funmatch.train(out=tmp_path / "run", steps=4, **options).folder
    student = load(str(run)).eval()
    assert student.card.classes == ("ant", "bee", "cat")
    views = torch.rand(2, 3, 32, 32)
    alone = transformers.AutoModelForImageClassification.from_pretrained(run / "student").eval()
    assert alone.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    with torch.no_grad():
        assert torch.equal(alone(student.normalize(views)).logits, student(views))
    monkeypatch.setattr("funmatch.models.save.save_transformers", lose_power)
    with pytest.raises(PowerLoss):
        funmatch.train(out=tmp_path / "stopped", steps=4, save_every=2, **options)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-4", ignore_errors=True)
    again = funmatch.train(out=tmp_path / "stopped", steps=4, save_every=2, **options).folder
    assert fingerprint(load(str(again)).net) == fingerprint(student.net)


@pytest.mark.parametrize(
    ("name", "pooled"),
    [
        ("Dinov2Model", "pooler"), ("ViTModel", "pooler"), ("ConvNextModel", "pooler"), ("ViTMSNModel", "class token"),
        ("IJepaModel", "mean"), ("CLIPVisionModel", "pooler"), ("SiglipVisionModel", "pooler"),
    ],
)  # fmt: skip
def test_features_of_networks_without_a_head(name, pooled, tmp_path):
    import transformers

    config = {} if name != "ConvNextModel" else {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    stem = name.removesuffix("Model")
    net = getattr(transformers, name)(getattr(transformers, f"{stem}Config")(**(config or VIT))).eval()
    folder = write_net(net, transformers.ViTImageProcessor(**WHOLE), tmp_path)
    model, views = load(str(folder)).eval(), torch.rand(2, 3, 32, 32)
    assert is_headless(model)
    with torch.no_grad():
        output = net(model.normalize(views))
        expected = {
            "pooler": lambda: output.pooler_output.flatten(1), "class token": lambda: output.last_hidden_state[:, 0],
            "mean": lambda: output.last_hidden_state.mean(1),
        }[pooled]()  # fmt: skip
        torch.testing.assert_close(model(views), expected)
        torch.testing.assert_close(Features(model)(views), expected)
        assert any("features are" in note for note in model.notes)
        assert model.net.patch_tokens(views).shape == (2, 1 if name == "ConvNextModel" else 16, 16)


def test_a_network_without_weights_of_its_pooler_gives_its_class_token(tmp_path):
    import transformers

    net = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False).eval()
    folder = write_net(net, transformers.ViTImageProcessor(**WHOLE), tmp_path / "vit")
    model, views = load(str(folder)).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(views), net(model.normalize(views)).last_hidden_state[:, 0])
    student = load(str(folder), classes=3).eval()
    assert student.num_classes == 3
    torch.nn.init.normal_(student.net.head.weight)
    (tmp_path / "student").mkdir()
    save(student, tmp_path / "student", card=student.card, about={"verb": "train"})
    again = load(str(tmp_path / "student")).eval()
    with torch.no_grad():
        assert torch.equal(again(views), student(views))
        torch.testing.assert_close(Features(again)(views), model(views))


def test_images_of_another_size_fit_the_position_embedding(tmp_path):
    import transformers

    folder = write("vit", tmp_path / "vit")
    views, net = torch.rand(2, 3, 48, 48), transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit")
    model = load(str(folder), side=48).eval()
    with torch.no_grad():
        expected = net.eval()(model.normalize(views), interpolate_pos_encoding=True).logits
        torch.testing.assert_close(model(views), expected)
    trained = open_trained_model(str(folder), side=48)
    assert trained.preprocessing.side == 48


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("config.json", {"auto_map": {"AutoModel": "net.Net"}}, r"code of its repository \(net\.Net\).*never run"),
        ("config.json", {"model_type": "vit9"}, "no network of the type 'vit9'"),
        ("config.json", {"architectures": ["ViTForMaskedImageModeling"]}, "is a ViTForMaskedImageModeling"),
        ("config.json", {"hidden_size": 24}, r"do not fit ViTForImageClassification.*expected \(24,\)"),
        ("preprocessor_config.json", {"image_mean": [0.5], "image_std": [0.5]}, "1 means in its processor.*3 channels"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantised"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "p.P"}}, "code of its repository"),
        ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "images of 48 pixels.*built for 32"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 40}}, "not a square.*pass --side N"),
        ("preprocessor_config.json", {"do_resize": False}, "does not resize images.*pass --side N"),
        ("preprocessor_config.json", {"resample": 0}, "nearest neighbour.*pass resample=antialias"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "PerceiverImageProcessor", "crop_size": {"height": 32, "width": 32}},
            "its PerceiverImageProcessor does more than",
        ),
        ("preprocessor_config.json", {"do_center_crop": True, "crop_size": {"height": 40, "width": 40}}, "pads"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_loaded_are_named(file, entries, message, tmp_path):
    folder = write("vit", tmp_path)
    edit(folder / file, **entries)
    with pytest.raises(InputError, match=message):
        load(str(folder))


def test_choices_stand_in_for_what_a_processor_does_not_say(tmp_path):
    folder = write("vit", tmp_path)
    edit(folder / "preprocessor_config.json", resample=0)
    assert load(str(folder), options=("resample=antialias",)).card.resample == "antialias"
    edit(folder / "preprocessor_config.json", resample=2, do_resize=False)
    model = load(str(folder), side=32)
    assert model.card.side == 32
    assert "central square" in model.notes[0]
    (folder / "preprocessor_config.json").unlink()
    model = load(str(folder))
    assert model.card.mean == (0.5, 0.5, 0.5)
    assert "assuming the defaults of ViTImageProcessor: mean 0.5 0.5 0.5" in model.notes[0]


def test_weights_that_are_missing_or_left_over_are_listed(tmp_path):
    folder = write("vit", tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["classifier.bias"]
    save_file(state | {"more": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing: classifier\.bias; not of this network: more"):
        load(str(folder))
    save_file(state | {"classifier.bias": torch.full((5,), torch.nan)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"not finite, as in classifier\.bias"):
        load(str(folder))


def test_options_replace_entries_of_the_configuration(tmp_path):
    folder = write("vit", tmp_path)
    assert load(str(folder), options=("hidden_dropout_prob=0.25",)).net.model.config.hidden_dropout_prob == 0.25
    with pytest.raises(InputError, match=r"unknown option of a vit network 'hidden_dropout'.*'hidden_dropout_prob'"):
        load(str(folder), options=("hidden_dropout=0.1",))

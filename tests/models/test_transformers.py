"""Networks of transformers: logits, features and students are those of the library itself; bad folders are named."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from PIL import Image
from safetensors.torch import load_file, save_file
from transformer_families import FAMILIES, FOUR, HIERA, QUICK, VIT, WHOLE, write, write_net

import funmatch
from funmatch.errors import InputError
from funmatch.models.classifier import fingerprint
from funmatch.models.inference.features import Features, is_headless
from funmatch.models.inference.frozen import Frozen, InferenceMode
from funmatch.models.load import load
from funmatch.models.save import save
from funmatch.models.transformers import hub
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
def logits_of_pipeline(folder: Path, path: str, *, quick: bool, **options: str) -> torch.Tensor:
    """The logits that transformers' own pipeline computes from a file."""
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    net = getattr(transformers, name).from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **options)
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
    for path in photographs if name not in QUICK else photographs[:4:3]:
        expected, found = logits_of_pipeline(folder, path, quick=name in QUICK), our_logits(folder, path)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), (path, found, expected)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("name", ["vit", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_every_filter_of_a_processor_is_that_of_transformers_pipeline(name, number, tmp_path, photographs):
    folder = write(name, tmp_path)
    edit(folder / "preprocessor_config.json", resample=number)
    # Its default cannot resize by box and Hamming filters.
    backend = {"backend": "pil"} if number in (4, 5) else {}
    for path in photographs[:4:3]:
        expected, found = logits_of_pipeline(folder, path, quick=True, **backend), our_logits(folder, path)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), (path, found, expected)


def test_normalisation_of_efficientnet_is_folded_into_mean_and_deviation(tmp_path):
    card = load(str(write("efficientnet", tmp_path))).card
    # ((byte / 127.5 − 1) − 0.5) / 0.5 / 0.5
    assert card.mean == pytest.approx([0.75] * 3)
    assert card.std == pytest.approx([0.125] * 3)


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


def options_for(folder: Path, images: Path) -> dict:
    return {"data": str(images), "student": str(folder), "side": 32, "batch": 4, "device": "cpu", "val": "none"}


def test_a_student_is_read_by_transformers_and_by_us(tmp_path, images):
    import transformers

    options = options_for(write("vit", tmp_path / "vit"), images)
    run = funmatch.train(out=tmp_path / "run", steps=2, **options).folder
    student, views = load(str(run)).eval(), torch.rand(2, 3, 32, 32)
    assert student.card.classes == ("ant", "bee", "cat")
    alone = transformers.AutoModelForImageClassification.from_pretrained(run / "student").eval()
    assert alone.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    with torch.no_grad():
        assert torch.equal(alone(student.normalize(views)).logits, student(views))
    # The processor that transformers finds beside it shows images as the student saw them.
    processor = transformers.AutoImageProcessor.from_pretrained(run / "student", backend="pil")
    image = torch.randint(0, 256, (50, 40, 3), dtype=torch.uint8)
    expected = student.normalize(open_trained_model(str(run)).preprocessing.view(image))
    found = processor(images=image.numpy(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_student_of_features_is_refused(name, tmp_path, images):
    options = options_for(write(name, tmp_path / "net"), images) | {"steps": 2, "match": ["features"]}
    with pytest.raises(InputError, match=r"net is not a timm network.* leave out match features"):
        funmatch.distill(teacher="fashion-mini-teacher", out=tmp_path / "run", **options)


class PowerLoss(Exception):
    """Stands for a power loss."""


def lose_power(*_):
    raise PowerLoss


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "deit-distilled", "mobilevit", "swin", "dinov2", "levit-distilled"])
def test_a_student_resumes_to_the_bit(name, tmp_path, images, monkeypatch):
    options = options_for(write(name, tmp_path / "net"), images)
    options |= {"save_every": 2, "steps": 4, "side": None}
    whole = funmatch.train(out=tmp_path / "whole", **options).folder
    monkeypatch.setattr("funmatch.models.save.save_transformers", lose_power)
    with pytest.raises(PowerLoss):
        funmatch.train(out=tmp_path / "stopped", **options)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-4", ignore_errors=True)
    again = funmatch.train(out=tmp_path / "stopped", **options).folder
    assert fingerprint(load(str(again)).net) == fingerprint(load(str(whole)).net)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("vit", 32), ("resnet", 64), ("mobilevit", 64)])
def test_a_teacher_is_matched(name, side, tmp_path, images):
    options = {"data": str(images), "steps": 2, "batch": 4, "device": "cpu"}
    network = write(name, tmp_path / "net")
    teacher = funmatch.finetune(model=str(network), out=tmp_path / "teacher", side=side, **options).folder
    options |= {"student": "fashion-mini-student", "side": 32, "teacher_side": [side], "allow_weak_teacher": True}
    run = funmatch.distill(teacher=str(teacher), out=tmp_path / "run", **options).folder
    assert load(str(run)).card.classes == ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("name", "pooled"),
    [
        ("Dinov2Model", "pooler"), ("ViTModel", "pooler"), ("ConvNextModel", "pooler"), ("ViTMSNModel", "class token"),
        ("IJepaModel", "mean"), ("DINOv3ViTModel", "pooler"), ("HieraModel", "pooler"),
        ("CLIPVisionModel", "pooler"), ("SiglipVisionModel", "pooler"),
    ],
)  # fmt: skip
def test_features_of_networks_without_a_head(name, pooled, tmp_path):
    import transformers

    config = {"ConvNextModel": FOUR, "HieraModel": HIERA | {"image_size": [32, 32]}}.get(name, VIT)
    stem = name.removesuffix("Model")
    net = getattr(transformers, name)(getattr(transformers, f"{stem}Config")(**config)).eval()
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
        tokens = output.last_hidden_state
        tokens = tokens.flatten(2).mT if tokens.ndim == 4 else tokens[:, -16:]
        torch.testing.assert_close(model.net.read_parts(model.normalize(views))[2].flatten(1, 2), tokens)


def test_a_network_without_weights_of_its_pooler_gives_its_class_token(tmp_path):
    import transformers

    net = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False).eval()
    folder = write_net(net, transformers.ViTImageProcessor(**WHOLE), tmp_path / "vit")
    model, views = load(str(folder)).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(views), net(model.normalize(views)).last_hidden_state[:, 0])


@pytest.mark.parametrize(("stem", "is_own"), [("ConvNext", True), ("Dinov2", False), ("Siglip", False)])
def test_a_head_on_a_network_that_had_none(stem, is_own, tmp_path):
    import transformers

    name = "SiglipVision" if stem == "Siglip" else stem
    config = FOUR if stem == "ConvNext" else VIT
    net = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    folder, views = write_net(net, transformers.ViTImageProcessor(**WHOLE), tmp_path / "net"), torch.rand(2, 3, 32, 32)
    student, features = load(str(folder), classes=3).eval(), load(str(folder)).eval()
    assert student.num_classes == 3
    assert not student(views).any()
    torch.nn.init.normal_(student.net.head.weight)
    (out := tmp_path / "student").mkdir()
    save(student, out, card=student.card, about={"verb": "train"})
    again = load(str(out)).eval()
    with torch.no_grad():
        assert torch.equal(again(views), student(views))
        torch.testing.assert_close(Features(again)(views), features(views))
    # Where transformers' classifier is the same function, it reads the folder, too.
    named = json.loads((out / "config.json").read_text())["architectures"]
    assert named == [f"{stem}ForImageClassification" if is_own else f"{name}Model"]
    if is_own:
        alone = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
        with torch.no_grad():
            assert torch.equal(alone(student.normalize(views)).logits, student(views))


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
        ("preprocessor_config.json", {"resample": 6}, r"not offered \(resample 6\); pass resample=antialias"),
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


LEGACY = [
    ("deit", {"feature_extractor_type": "DeiTFeatureExtractor", "size": 38, "crop_size": 32, "do_center_crop": True}),
    ("resnet", {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 32, "crop_pct": 0.875}),
    ("clip", {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "do_center_crop": True}),
    ("vit", {"feature_extractor_type": "ViTFeatureExtractor", "size": 32}),
]


@pytest.mark.parametrize(("name", "entries"), LEGACY, ids=[name for name, _ in LEGACY])
def test_processors_of_earlier_versions_mean_the_same(name, entries, tmp_path):
    folder = write(name, tmp_path)
    expected, path = load(str(folder)).card, folder / "preprocessor_config.json"
    shared = {"do_normalize": True, "do_resize": True, "image_mean": expected.mean, "image_std": expected.std}
    shared["resample"] = json.loads(path.read_text())["resample"]
    path.write_text(json.dumps(shared | entries))
    assert load(str(folder)).card == expected
    path.unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": shared | entries}))
    assert load(str(folder)).card == expected


def test_weights_of_earlier_versions_and_of_torch_are_read(tmp_path):
    folder, views = write("vit", tmp_path), torch.rand(1, 3, 32, 32)
    expected = load(str(folder)).eval()(views)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({key: tensor.double() for key, tensor in state.items()}, folder / "pytorch_model.bin")
    torch.testing.assert_close(load(str(folder)).eval()(views), expected)


def test_choices_stand_in_for_what_a_processor_does_not_say(tmp_path):
    folder = write("vit", tmp_path)
    edit(folder / "preprocessor_config.json", resample=6)
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


@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
def test_networks_for_images_and_texts_give_the_features_that_both_share(stem, tmp_path):
    import transformers

    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    more = {"projection_dim": 16} if stem == "CLIP" else {}
    config = getattr(transformers, f"{stem}Config")(vision_config=VIT | more, text_config=text, **more)
    net = getattr(transformers, f"{stem}Model")(config).eval()
    folder = write_net(net, transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tmp_path)
    model, views = load(str(folder)).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = net.get_image_features(pixel_values=model.normalize(views)).pooler_output
        torch.testing.assert_close(model(views), expected)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"vision_more": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not of this network: vision_more"):
        load(str(folder))


def test_a_network_that_masks_images_at_random_is_refused(tmp_path):
    import transformers

    net = transformers.ViTMAEModel(transformers.ViTMAEConfig(**VIT))
    with pytest.raises(InputError, match="ViTMAEModel masks images at random"):
        load(str(write_net(net, transformers.ViTImageProcessor(**WHOLE), tmp_path)))


def test_modules_from_python():
    import transformers

    views = torch.rand(2, 3, 32, 32)
    backbone = transformers.Dinov2Model(transformers.Dinov2Config(**VIT)).eval()
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=4)).eval()
    with torch.no_grad():
        torch.testing.assert_close(load(backbone).eval()(views), backbone(views).pooler_output)
        torch.testing.assert_close(load(classifier).eval()(views), classifier(views).logits)
    assert is_headless(load(backbone))
    assert load(classifier).num_classes == 4

    class OwnModel(transformers.ViTForImageClassification):
        """A class of the user's own, which is called like a network without a head."""

    assert load(OwnModel(classifier.config)).num_classes == 4


@pytest.mark.parametrize("size", [48, [48, 48], (48, 48), {"height": 48, "width": 48}])
def test_the_size_that_a_module_states_is_read_in_each_form(size):
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    net.config = SimpleNamespace(image_size=size)
    assert load(net).card.side == 48


HUB_ERRORS = [
    ("GatedRepoError", "asks for its conditions to be accepted.*hf auth login"),
    ("RepositoryNotFoundError", "has no model user/net, or you may not see it"),
    ("LocalEntryNotFoundError", "cannot download the weights of hf-hub:user/net.*without a network"),
    ("EntryNotFoundError", r"has no config\.json"),
    ("HFValidationError", "is not the name of a model on the Hub"),
]


@pytest.mark.parametrize(("name", "message"), HUB_ERRORS)
def test_a_repository_that_cannot_be_had_is_named(name, message, monkeypatch):
    def fail(*_, **__):
        kind = getattr(errors, name)
        raise kind.__new__(kind, "it is not there")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(InputError, match=message):
        load("hf-hub:user/net")


def test_a_repository_is_fetched_by_its_layout(tmp_path, monkeypatch):
    folder, asked = write("vit", tmp_path / "vit"), []

    def snapshot(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "hf_hub_download", lambda _, file, **__: str(folder / file))
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    model = load("hf-hub:user/net@v2")
    assert (model.card.name, model.num_classes) == ("hf-hub:user/net@v2", 5)
    assert asked[0][:2] == ("user/net", "v2")
    # Neither code nor weights of other libraries.
    assert not {"*.py", "*", "tf_model.h5"} & set(asked[0][2])
    (folder / "config.json").write_text('{"architecture": "resnet10t", "pretrained_cfg": {}}')
    assert hub.hub_folder("hf-hub:user/net") is None


def test_without_the_library_its_extra_is_named(tmp_path, monkeypatch):
    folder = write("vit", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'funmatch\[transformers\]'"):
        load(str(folder))


def test_timm_cannot_read_networks_of_transformers(tmp_path, images):
    folder = write("vit", tmp_path / "vit")
    with pytest.raises(InputError, match="is not a network of timm"):
        funmatch.export(model=str(folder), out=tmp_path / "out", format=["timm"], data=str(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "deit-distilled", "swin", "mobilevit", "convnext", "dinov2"])
def test_networks_are_exported(name, tmp_path, images):
    folder = write(name, tmp_path / name)
    found = funmatch.export(model=str(folder), out=tmp_path / "out", format=["onnx"], data=str(images))
    assert found["formats"]["onnx"]["max_relative"] < 1e-4


def test_a_network_that_needs_more_than_images_is_refused(tmp_path):
    import transformers

    config = transformers.Siglip2VisionConfig(**{key: value for key, value in VIT.items() if key != "image_size"})
    folder = write_net(transformers.Siglip2VisionModel(config), transformers.Siglip2ImageProcessor(), tmp_path)
    with pytest.raises(InputError, match="needs more than images: pixel_attention_mask, spatial_shapes"):
        load(str(folder))

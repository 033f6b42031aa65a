"""Loading models by name and weights, errors for what does not fit, and saved students that timm alone loads."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from funmatch.errors import InputError
from funmatch.models import classifier as models
from funmatch.models.inference.frozen import Frozen
from funmatch.models.load import load
from funmatch.models.save import save
from funmatch.models.timm_models import create, parse_options
from funmatch.runtime.disk.checksums import write_manifest

SMALL = ("channels=(8,8,16,16)", "stem_width=8")


def test_classifier_normalises_by_its_card():
    model = load("resnet10t", options=SMALL, classes=4).eval()
    views = torch.rand(2, 3, 32, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(views), model.net((views - mean) / std))
    assert model.card.mean == (0.485, 0.456, 0.406)
    assert load("resnetv2_50x1_bit", classes=2).card.mean == (0.5, 0.5, 0.5)


def test_bit_r50_has_the_published_number_of_parameters():
    assert load("resnetv2_50x1_bit", classes=37).count_parameters() == 23_576_165


def test_one_channel_networks_accept_rgb_views():
    model = load("resnet10t", options=(*SMALL, "in_chans=1"), classes=3).eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_fixed_input_sizes_are_built_for_the_side():
    vit = load("vit_tiny_patch16_224", options=("depth=1",), classes=3, side=64).eval()
    assert vit(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def test_options_are_read_as_python_values():
    parsed = parse_options(("channels=16,32", "drop_rate=0.1", "act_layer=gelu", "flag=True"))
    assert parsed == {"channels": (16, 32), "drop_rate": 0.1, "act_layer": "gelu", "flag": True}
    with pytest.raises(InputError, match="key=value"):
        parse_options(("channels",))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "did you mean .*'resnet50'"),
        ("resnetv2_50x1_bitt", "did you mean 'resnetv2_50x1_bit'"),
        ("fashion-mini-techer", "did you mean 'fashion-mini-teacher'"),
        ("resnetv2_50x1_bit.goog_in21", "did you mean .*'resnetv2_50x1_bit.goog_in21k'"),
        ("some/where", "no folder some/where.*hf-hub:some/where"),
        ("local-dir:nowhere", "missing"),
    ],
)
def test_unknown_names_suggest_near_ones(name, message):
    with pytest.raises(InputError, match=message):
        load(name)


def test_unknown_model_options_are_rejected():
    with pytest.raises(InputError, match="chanels"):
        load("resnet10t", options=("chanels=1",))


def test_saved_classifier_gives_equal_logits_in_timm(tmp_path):
    torch.manual_seed(0)
    model = load("resnet10t", options=SMALL, classes=4).eval()
    for buffer in model.net.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    card = replace(model.card, side=40, crop_fraction=0.8, mean=(0.1, 0.2, 0.3), classes=("a", "b", "c", "d"))
    save(model.to(memory_format=torch.contiguous_format), tmp_path, card=card, about={"verb": "test"})
    views = torch.randn(2, 3, 40, 40)
    with_timm_alone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(with_timm_alone(views), model.net(views))
    config = timm.data.resolve_model_data_config(with_timm_alone)
    assert tuple(config["input_size"]) == (3, 40, 40)
    assert tuple(config["mean"]) == (0.1, 0.2, 0.3)
    assert config["crop_pct"] == 0.8
    reloaded = load(str(tmp_path))
    # What a verb of ours has trained is known to tell classes apart.
    assert reloaded.card == replace(card, name=str(tmp_path), task="multiclass")
    assert models.fingerprint(reloaded.net) == models.fingerprint(model.net)


@pytest.fixture(name="state")
def resnet_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return timm.create_model("resnet10t", num_classes=7, channels=(8, 8, 16, 16), stem_width=8).state_dict()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_set_the_number_of_classes(tmp_path, state, suffix):
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    model = load("resnet10t", weights=path, options=SMALL)
    assert model.num_classes == 7
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.net.state_dict().items())


def test_weights_that_do_not_fit_are_rejected(tmp_path, state):
    def assert_refused(change, message):
        changed = dict(state)
        change(changed)
        save_file(changed, tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=message):
            load("resnet10t", weights=tmp_path / "w.safetensors", options=SMALL)

    assert_refused(lambda s: s.pop("bn1.bias"), "bn1.bias is missing")
    assert_refused(lambda s: s.update(extra=torch.zeros(1)), "extra is not of this model")
    assert_refused(lambda s: s.update({"bn1.bias": torch.zeros(3)}), r"has shape \(3,\)")
    assert_refused(lambda s: s.update({"bn1.bias": torch.full((8,), float("nan"))}), "not finite")
    assert_refused(lambda s: s.pop("fc.weight"), "fc.weight is missing")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_files_without_a_state_dict_are_rejected(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    with pytest.raises(InputError, match="no weights file"):
        load("resnet10t", weights=path)
    path.write_bytes(b"\x80\x04garbage")
    with pytest.raises(InputError, match="not a state dict"):
        load("resnet10t", weights=path)


class Exploit:
    def __reduce__(self):
        return print, ("unpickled",)


def test_loading_runs_no_pickled_code(tmp_path, capsys):
    torch.save({"fc.weight": Exploit()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="not a state dict"):
        load("resnet10t", weights=tmp_path / "w.pt")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "scratch"), [("resnet18.a1_in1k", True), ("hf-hub:timm/x.y", False)])
def test_weights_that_cannot_be_downloaded(name, scratch, monkeypatch):
    def create_model(*_, **__):
        raise OSError("we cannot find the requested files in the local cache. Please check your connection")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(InputError, match=r"the Hugging Face Hub cannot be reached.*--teacher-weights") as error:
        create(name, {}, pretrained=True)
    assert ("start from random weights, as resnet18" in str(error.value)) == scratch


def test_unsupported_side_is_rejected():
    vit = load("vit_tiny_patch16_224", options=("depth=1",), classes=3)
    with pytest.raises(InputError, match="made for 224"):
        models.check_side(vit, 100)


def test_frozen_teacher_is_not_changed_by_training_mode():
    teacher = Frozen(load("resnet10t", options=SMALL, classes=3))
    parent = torch.nn.ModuleList([teacher]).train()
    before = models.fingerprint(teacher)
    logits = parent[0](torch.rand(4, 3, 32, 32, requires_grad=True))
    assert not any(module.training for module in teacher.classifier.modules())
    assert not logits.requires_grad
    assert models.fingerprint(teacher) == before


def test_transformer_weights_are_resized_to_another_side(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    model = load("vit_tiny_patch16_224", weights=tmp_path / "w.safetensors", options=("depth=1",), side=64).eval()
    views = torch.rand(2, 3, 64, 64)
    net.set_input_size(img_size=64)
    with torch.no_grad():
        expected = net(views * 2 - 1)
        torch.testing.assert_close(model(views), expected)
    (tmp_path / "out").mkdir()
    save(model, tmp_path / "out", card=replace(model.card, side=64), about={})
    with_timm_alone = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(with_timm_alone(views * 2 - 1), expected)


def test_tag_sets_the_normalisation_of_given_weights(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    for tag in timm.list_pretrained("vit_tiny_patch16_224.*"):
        model = load(tag, weights=tmp_path / "w.safetensors", options=("depth=1",))
        assert model.card.mean == tuple(timm.get_pretrained_cfg(tag).mean)


def test_fingerprint_covers_settings_that_are_not_weights():
    def vit(**options):
        net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, **options)
        return models.Classifier(net, models.Card("vit", 32, 1.0, (0.5,) * 3, (0.5,) * 3, None))

    class WithTemperature(torch.nn.Module):
        def __init__(self, tau):
            super().__init__()
            self.tau, self.num_classes = tau, 2

    card = models.Card("cooled", 8, 1.0, (0.0,) * 3, (1.0,) * 3, None)
    classifiers = [vit(num_heads=3), vit(num_heads=6), vit(num_heads=3, global_pool="avg")]
    classifiers += [models.Classifier(WithTemperature(tau), card) for tau in (1, 4)]
    digests = list(map(models.function_of, classifiers))
    assert len(set(digests)) == 5
    in_training_mode = vit(num_heads=3).train()
    assert models.function_of(in_training_mode) == digests[0] == models.function_of(in_training_mode.eval())


def test_too_many_classes_in_a_configuration_are_named(tmp_path):
    model = load("resnet10t", classes=3, options=("channels=(4, 4, 4, 4)", "stem_width=4"))
    save(model, tmp_path / "model", card=model.card, about={})
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["model_args"]["num_classes"] = 10**13
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"too little memory .*/model, .* 160,000\.0 GB; check the number of classes"):
        load(str(tmp_path / "model"))


def test_too_many_classes_in_an_option_are_named():
    with pytest.raises(InputError, match="num_classes=1000000000 is more than the 1,000,000 classes"):
        load("resnet18", options=("num_classes=1000000000",))


def test_a_damaged_file_of_weights_in_a_folder_of_ours_is_refused(tmp_path):
    model = load("resnet10t", classes=3, options=("channels=(4, 4, 4, 4)", "stem_width=4"))
    save(model, tmp_path / "model", card=model.card, about={})
    write_manifest(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    options = {"options": ("channels=(4, 4, 4, 4)", "stem_width=4")}
    load("resnet10t", weights=path, **options)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model.safetensors does not match its checksum.*; copy the folder again"):
        load("resnet10t", weights=path, **options)
    # Other files of the folder are not what is used.
    path.rename(copied := path.with_name("own.safetensors"))
    load("resnet10t", weights=copied, **options)

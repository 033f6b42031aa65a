"""Files as trainers save them, against the logits of the network that was saved: wrappers, averages, types, names."""

import argparse
import pathlib

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import funmatch
from funmatch.errors import InputError
from funmatch.models.inference.features import is_headless
from funmatch.models.load import load

ARCHITECTURE = "test_resnet"
IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    net = timm.create_model(ARCHITECTURE, num_classes=5)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


NET, OTHER = network(0), network(1)
STATE, AVERAGE = NET.state_dict(), OTHER.state_dict()
BODY = {name: tensor for name, tensor in STATE.items() if not name.startswith("fc.")}


@torch.inference_mode()
def gives_the_logits_of(net, saved):
    # Up to the layout of kernels, which changes the order of sums.
    return torch.allclose(net.eval()(IMAGES), saved.eval()(IMAGES), rtol=0, atol=2e-6)


def test_the_networks_differ():
    assert not gives_the_logits_of(NET, OTHER)


def under(prefix, state=STATE):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def loaded(tmp_path, saved, *options, **more):
    torch.save(saved, tmp_path / "w.pth")
    return load(ARCHITECTURE, weights=tmp_path / "w.pth", options=options, **more)


def notes_of(model):
    return [note.partition("w.pth: ")[2] for note in model.notes]


class Task(torch.nn.Module):
    """A network in a module with a loss and metrics, as Lightning users write it."""

    def __init__(self, **networks):
        super().__init__()
        for name, net in networks.items():
            self.add_module(name, net)
        self.criterion = torch.nn.CrossEntropyLoss(weight=torch.ones(5))
        self.accuracy = torch.nn.BatchNorm1d(3)


def with_head_beside(state):
    return {f"{'head' if name.startswith('fc.') else 'backbone'}.{name}": tensor for name, tensor in state.items()}


def averaged():
    average = AveragedModel(NET, use_buffers=True)
    average.update_parameters(NET)
    average.update_parameters(OTHER)
    return average


TRAINERS = {
    "timm": {
        "epoch": 3, "arch": ARCHITECTURE, "state_dict": STATE, "state_dict_ema": AVERAGE, "metric": np.float64(91.5),
        "args": argparse.Namespace(lr=0.1), "amp_scaler": {"scale": 65536.0}, "version": 2,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
    },
    "torchvision": {
        "model": STATE, "model_ema": averaged().state_dict(), "lr_scheduler": {"last_epoch": 1},
        "args": argparse.Namespace(output_dir=pathlib.PurePosixPath("out")),
    },
    "Lightning": {
        "epoch": 3, "pytorch-lightning_version": "2.4.0", "hyper_parameters": argparse.Namespace(lr=0.1),
        "state_dict": Task(model=NET, ema_model=OTHER).state_dict(), "callbacks": {"best": pathlib.PurePosixPath("a")},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    },
    "compiled and distributed": {"model": under("module._orig_mod."), "swa_model": averaged().state_dict()},
    "momentum": {"state_dict": under("module.base_encoder.") | under("module.momentum_encoder.", AVERAGE)},
    "mmpretrain": {"state_dict": with_head_beside(STATE), "ema_state_dict": with_head_beside(AVERAGE)},
    "whole modules": {"model": torch.nn.DataParallel(NET), "ema": averaged()},
    "a tuple": (STATE, {"lr": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.filterwarnings("ignore:.*__weakref__")
def test_files_of_trainers_give_the_logits_of_their_network(tmp_path, trainer):
    model = loaded(tmp_path, TRAINERS[trainer])
    assert gives_the_logits_of(model.net, NET)
    assert any(note.startswith("using the weights under ") for note in notes_of(model))


AVERAGES = {
    "timm": ("state_dict_ema", OTHER),
    "torchvision": ("model_ema", averaged().module),
    "Lightning": ("ema_model", OTHER),
    "compiled and distributed": ("swa_model", averaged().module),
    "momentum": ("state_dict.module.momentum_encoder", OTHER),
    "mmpretrain": ("ema_state_dict", OTHER),
    "whole modules": ("ema", averaged().module),
}


@pytest.mark.parametrize("trainer", AVERAGES)
def test_averaged_weights_are_chosen_by_their_key(tmp_path, trainer):
    key, net = AVERAGES[trainer]
    note = notes_of(loaded(tmp_path, TRAINERS[trainer]))[0]
    # The default names the choice, with the key to copy.
    assert f"(weights_key={key}" in note or f".{key}" in note.partition("(weights_key=")[2]
    chosen = loaded(tmp_path, TRAINERS[trainer], f"weights_key={key}")
    assert gives_the_logits_of(chosen.net, net)
    assert "weights_key" not in chosen.options


def test_one_of_several_networks_is_chosen_by_its_key(tmp_path):
    for saved in ({"student": under("module."), "teacher": AVERAGE}, Task(student=NET, teacher=OTHER).state_dict()):
        with pytest.raises(InputError, match=r"several weights .*; choose with weights_key=teacher in --teacher-k"):
            loaded(tmp_path, saved)
        assert gives_the_logits_of(loaded(tmp_path, saved, "weights_key=student").net, NET)
        assert gives_the_logits_of(loaded(tmp_path, saved, "weights_key=teacher").net, OTHER)
    with pytest.raises(InputError, match=r"no weights under weights_key=ema; it has student, student\.module, teacher"):
        loaded(tmp_path, {"student": under("module."), "teacher": AVERAGE}, "weights_key=ema")


def test_keys_are_for_files_of_weights(tmp_path):
    for name, weights in (("resnet18", None), ("resnetv2_50x1_bit", tmp_path / "w.npz"), ("a.npz", None)):
        with pytest.raises(InputError, match=r"weights_key chooses among the weights in a file of torch\.save"):
            load(name, weights=weights, options=("weights_key=ema",))


def test_keys_choose_for_networks_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(
        "import timm\ndef make(): return timm.create_model('test_resnet', num_classes=5)"
    )
    monkeypatch.chdir(tmp_path)
    torch.save({"student": STATE, "teacher": AVERAGE}, "w.pth")
    model = funmatch.load("own_networks:make", weights=tmp_path / "w.pth", options=("weights_key=teacher",))
    assert gives_the_logits_of(model.net.eval(), OTHER)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_of_other_widths_become_float32_and_a_note_says_so(tmp_path, dtype, suffix):
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}
    path = tmp_path / f"w.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    model = load(ARCHITECTURE, weights=path)
    rounded = network(0)
    rounded.load_state_dict(state)
    assert gives_the_logits_of(model.net, rounded)
    assert [note.partition(f"w.{suffix}: ")[2] for note in model.notes] == [
        f"weights of {str(dtype).removeprefix('torch.')}, used as float32"
    ]


def test_weights_rounded_to_integers_are_refused(tmp_path):
    weight = STATE["fc.weight"].mul(100).to(torch.int8)
    with pytest.raises(InputError, match=r"fc\.weight is of int8, expected floating-point numbers"):
        loaded(tmp_path, STATE | {"fc.weight": weight})


def test_networks_without_classes_take_the_features_alone(tmp_path):
    features = timm.create_model(ARCHITECTURE, num_classes=0).eval()
    features.load_state_dict(BODY)
    for saved in (BODY, STATE, {"teacher": under("backbone.", BODY) | {"head.mlp.0.weight": torch.ones(3, 3)}}):
        model = loaded(tmp_path, saved, "num_classes=0")
        assert is_headless(model)
        assert gives_the_logits_of(model.net, features)
    assert "left out head.mlp.0.weight" in notes_of(model)[-1]


def test_messages_list_what_is_missing_and_what_is_left_over(tmp_path):
    renamed = {name.replace("bn1", "norm1"): tensor for name, tensor in STATE.items()}
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, renamed)
    message = str(caught.value)
    # Of the stem and the first blocks' norms, in the network's order.
    missing, left = message.partition(" does not fit test_resnet: ")[2].split("; ")
    assert missing.startswith("bn1.weight, bn1.bias, ")
    assert missing.endswith(" and 15 more are missing")
    assert left.startswith("norm1.weight, ")
    assert left.endswith(" and 20 more are not of this model")

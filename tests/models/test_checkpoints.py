"""Files of weights as trainers save them: what stands around the tensors, their names, other files in their place."""

import argparse
import collections
import contextlib
import datetime
import gzip
import io
import json
import pathlib
import pickle
import pickletools
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save, save_file
from timm.models import save_for_hf

import funmatch
from funmatch.errors import InputError
from funmatch.models.checkpoints.checkpoint import open_checkpoint
from funmatch.models.checkpoints.pickled import read_pickle
from funmatch.models.load import load

ARCHITECTURE = "test_resnet"


def network(seed=0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(ARCHITECTURE, num_classes=2, **options)


NET = network()
STATE = NET.state_dict()
OTHER = network(1).state_dict()
BACKBONE = {name: tensor for name, tensor in STATE.items() if not name.startswith("fc.")}
HEAD = {name: STATE[name] for name in ("fc.weight", "fc.bias")}


def under(prefix, state=STATE):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


class Settings:
    """Stands for a class that is not installed where the file is read."""

    def __init__(self):
        self.rate, self.me = 0.1, self


class Exploit:
    def __reduce__(self):
        return print, ("executed",)


def loaded(tmp_path, saved, **options):
    path = tmp_path / "weights.pth"
    torch.save(saved, path)
    return load(ARCHITECTURE, weights=path, **options)


def assert_equal(net, expected):
    state = net.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


BESIDE = {
    "options": argparse.Namespace(lr=0.1),
    "numpy scalar": np.float64(0.9),
    "numpy array": np.arange(3),
    "generator": np.random.RandomState(0).get_state(),
    "path": pathlib.PurePosixPath("a"),
    "date": datetime.datetime(2024, 1, 1),
    "collections": [collections.Counter("aa"), collections.defaultdict(list, a=[1]), {1, 2}, frozenset({1}), (1, 2)],
    "settings": Settings(),
    "code": Exploit(),
    "optimizer": {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_what_stands_beside_the_tensors_is_left_unread(tmp_path, capsys, beside, new):
    torch.save({"model": STATE, beside: BESIDE[beside]}, tmp_path / "w", _use_new_zipfile_serialization=new)
    assert_equal(load(ARCHITECTURE, weights=tmp_path / "w").net, STATE)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["net", "network", "module", "params", "weights", "model_ema", "ema", "state_dict_ema"])
def test_state_dicts_are_found_under_any_key(tmp_path, key):
    assert_equal(loaded(tmp_path, {key: STATE, "accuracy": 91}).net, STATE)
    assert_equal(loaded(tmp_path, {"run": {key: {"state_dict": STATE}}}).net, STATE)


PREFIXES = ["model.", "net.", "backbone.", "base.", "module.", "_orig_mod.", "_forward_module.", "model.module."]


@pytest.mark.parametrize("prefix", [*PREFIXES, "model._orig_mod.", "module._orig_mod.", "encoder_q."])
def test_names_may_stand_under_any_prefix(tmp_path, prefix):
    model = loaded(tmp_path, {"state_dict": under(prefix) | {"criterion.weight": torch.ones(2)}})
    assert_equal(model.net, STATE)
    inner = f"state_dict.{prefix}".replace("._orig_mod.", ".", prefix.count("._orig_mod.")).rstrip(".")
    said = [f"using the weights under '{inner}'", "left out criterion.weight, not part of test_resnet"]
    assert [note.partition(": ")[2] for note in model.notes] == said


@pytest.mark.parametrize("part", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"])
def test_wrappers_inside_the_names_are_ignored(tmp_path, part):
    renamed = {name.replace("layer1.", f"layer1.{part}."): tensor for name, tensor in STATE.items()}
    assert_equal(loaded(tmp_path, renamed).net, STATE)


def test_tensors_of_tools_are_left_out(tmp_path):
    averaged = loaded(tmp_path, {"n_averaged": torch.tensor(3)} | under("module."))
    assert_equal(averaged.net, STATE)
    assert "left out n_averaged" in averaged.notes[1]
    counted = loaded(tmp_path, STATE | {"total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)})
    assert_equal(counted.net, STATE)
    assert "total_ops, layer1.0.total_params" in counted.notes[0]


def test_weights_with_more_layers_are_those_of_another_network(tmp_path):
    with pytest.raises(InputError, match=r"layer1\.0\.se\.weight is not of this model"):
        loaded(tmp_path, {"state_dict": under("model.", STATE | {"layer1.0.se.weight": torch.ones(2)})})


def test_a_head_beside_the_backbone_is_found(tmp_path):
    model = loaded(tmp_path, {"meta": {}, "state_dict": under("backbone.", BACKBONE) | under("head.", HEAD)})
    assert_equal(model.net, STATE)
    assert_equal(loaded(tmp_path, {"backbone": BACKBONE, "head": HEAD}).net, STATE)


def test_heads_of_earlier_timm_versions_are_read(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("resnetv2_18", num_classes=3).state_dict()
    old = {name.replace("head.fc", "fc"): tensor for name, tensor in state.items()}
    old["fc.weight"] = old["fc.weight"].flatten(1)
    torch.save(old, tmp_path / "w.pth")
    assert_equal(load("resnetv2_18", weights=tmp_path / "w.pth").net, state)


def test_averaged_weights_are_taken_only_alone(tmp_path):
    model = loaded(tmp_path, {"state_dict_ema": OTHER, "state_dict": STATE})
    assert_equal(model.net, STATE)
    assert "'state_dict', not the EMA weights under 'state_dict_ema'" in model.notes[0]
    assert_equal(loaded(tmp_path, {"ema": {"module": OTHER, "decay": 0.9}}).net, OTHER)


def test_several_weights_that_fit_are_refused_unless_they_are_the_same(tmp_path):
    with pytest.raises(InputError, match=r"several weights that fit test_resnet, under 'student\.module', 'teacher'"):
        loaded(tmp_path, {"student": under("module."), "teacher": OTHER})
    assert_equal(loaded(tmp_path, {"model": STATE, "best": STATE}).net, STATE)
    wider = network(stem_width=32).state_dict()
    assert_equal(loaded(tmp_path, {"student": STATE, "teacher": wider}).net, STATE)


def test_weights_without_a_head_are_only_for_students(tmp_path):
    for saved in (BACKBONE, {"teacher": under("backbone.", BACKBONE) | {"backbone.fc.0.weight": torch.ones(2, 2)}}):
        with pytest.raises(InputError, match=r"without a head for test_resnet \(no fc\.weight.*only a student"):
            loaded(tmp_path, saved)
        student = loaded(tmp_path, saved, classes=5)
        zeros = {"fc.weight": torch.zeros(5, STATE["fc.weight"].shape[1]), "fc.bias": torch.zeros(5)}
        assert_equal(student.net, BACKBONE | zeros)
        assert "starts at zero" in student.notes[-1]
    with pytest.raises(InputError, match=r"conv1\.1\.bias, fc\.weight, fc\.bias are missing$"):
        loaded(tmp_path, {k: v for k, v in BACKBONE.items() if k != "conv1.1.bias"}, classes=5)


def test_weights_of_another_network_are_shown_with_both_names(tmp_path):
    saved = {"state_dict": {"a.b": torch.ones(2), "c": torch.ones(1)}, "epoch": 3}
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, saved)
    message = str(caught.value)
    assert "It has a.b, c, … under 'state_dict' (the file has the keys state_dict, epoch)" in message
    assert "the network has conv1.0.weight, " in message


@pytest.mark.parametrize("saved", [NET, {"model": NET, "epoch": 1}], ids=["alone", "in a dict"])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_of_whole_modules_the_tensors_are_read_and_no_code(tmp_path, saved, new):
    torch.save(saved, tmp_path / "w", _use_new_zipfile_serialization=new)
    model = load(ARCHITECTURE, weights=tmp_path / "w")
    assert_equal(model.net, STATE)
    assert "a whole module (timm.models.resnet.ResNet); its tensors are read, no code" in model.notes[-1]
    with pytest.raises(InputError, match=r"whole module \(timm\.models\.resnet\.ResNet\).*model\.state_dict\(\)"):
        load("test_vit", weights=tmp_path / "w")


def tensors():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    found = {str(dtype): base.abs().mul(9).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)}
    found |= {str(dtype): base.abs().mul(9).to(dtype) for dtype in (torch.int64, torch.uint8, torch.bool)}
    found |= {"part": base[2:4, 3:], "turned": base.T, "whole": base, "scalar": torch.tensor(3.0)}
    found |= {"empty": torch.empty(0, 3), "broadcast": torch.ones(3, 1).expand(3, 4)}
    found |= {"parameter": torch.nn.Parameter(base), "with grad": base.clone().requires_grad_()}
    return found | {"channels last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_tensors_are_those_that_torch_reads(tmp_path, new, protocol):
    torch.save(tensors(), tmp_path / "w", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    found = open_checkpoint(tmp_path / "w").entries
    expected = torch.load(tmp_path / "w", weights_only=False)  # True reads no protocol but 2
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        actual = found[name].read()
        assert actual.dtype == tensor.dtype
        assert found[name].shape == actual.shape == tensor.shape
        assert actual.stride() == tensor.stride()
        assert torch.equal(actual, tensor)


def test_types_of_eight_bits_and_arrays_of_numpy_are_read(tmp_path):
    eight = torch.randn(4).to(torch.float8_e4m3fn)
    arrays = {"f4": np.arange(6, dtype=np.float32).reshape(2, 3), "F": np.asfortranarray(np.eye(3)), "i8": np.arange(3)}
    torch.save({"eight": eight, **arrays}, tmp_path / "w")
    found = open_checkpoint(tmp_path / "w").entries
    assert torch.equal(found["eight"].read().float(), eight.float())
    assert all(np.array_equal(found[name].read().numpy(), array) for name, array in arrays.items())
    (tmp_path / "p").write_bytes(pickle.dumps(arrays))
    found = open_checkpoint(tmp_path / "p").entries
    assert all(np.array_equal(found[name].read().numpy(), array) for name, array in arrays.items())


@pytest.mark.parametrize("kind", ["sparse", "quantized", "meta"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_are_refused(tmp_path, kind):
    weight = STATE["fc.weight"]
    made = {
        "sparse": weight.to_sparse,
        "quantized": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "meta": lambda: weight.to("meta"),
    }
    with pytest.raises(InputError, match=rf"fc\.weight is .*{kind}.*expected a dense tensor"):
        loaded(tmp_path, STATE | {"fc.weight": made[kind]()})


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_is_read_as_pickle_does(protocol):
    data = {"a": [1, 2**40, -1, 2.5, None, True, False, "ü" * 300], (1, 2, 3, 4): {(): ((), {}, [])}}
    data["same"] = data["a"]
    data["lists"] = [list(range(3000)), list(map(str, range(300)))]
    # Earlier protocols write these as calls.
    data |= {"sets": [{1}, frozenset({2}), b"\xff" * 300, b""]} if protocol >= 4 else {}
    found = read_pickle(io.BytesIO(pickle.dumps(data, protocol)), {})
    assert found == data
    assert found["same"] is found["a"]


def test_the_reader_knows_every_operation_of_pickles():
    from funmatch.models.checkpoints.pickled import CONSTANTS, PUSHED, STEPS

    unknown = {
        code.name
        for code in pickletools.opcodes
        if code.name not in CONSTANTS
        and code.name not in STEPS
        and not code.name.rstrip("0123456789").endswith(PUSHED)
        and code.name not in ("PROTO", "FRAME", "STOP")
    }
    # References to a registry and to memory of the process that wrote them: no file has these.
    assert unknown == {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def torch_bytes(**options):
    buffer = io.BytesIO()
    torch.save(STATE, buffer, **options)
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
WRONG = {
    "pointer": (LFS, "a pointer of Git LFS.*git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html>", "a web page"),
    "xml": (b'<?xml version="1.0"?><Error>', "an XML file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file, probably a file of Keras"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.4.0" + bytes(99), "a model of ONNX"),
    "keras": (zipped(config__json="{}", model__weights__h5="x"), "a file of Keras"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(90), "a model of TensorFlow Lite"),
    "gzip": (gzip.compress(b"x"), "packed with gzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(90), "packed with 7-Zip"),
    "empty": (b"", "an empty file"),
    "half a zip": (torch_bytes()[:9000], "incomplete"),
    "half a legacy file": (torch_bytes(_use_new_zipfile_serialization=False)[:-50], "incomplete"),
    "zip of a file": (zipped(model__pth=b"x"), r"a zip archive of model\.pth; unpack it"),
    "arrays": (zipped(a__npy=b"x"), r"rename it to \.npz"),
    "answer": (b'{"error": "not found"}', "a text file.*not found"),
    "garbage": (b"\x80\x04garbage", "is not a state dict"),
    "zeros": (bytes(2000), "is not a state dict"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_first_bytes_tell_what_a_wrong_file_is(tmp_path, kind, suffix):
    content, message = WRONG[kind]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(ARCHITECTURE, weights=path)
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_pointers_in_place_of_npz_files_are_named(tmp_path):
    (tmp_path / "w.npz").write_bytes(LFS)
    with pytest.raises(InputError, match="a pointer of Git LFS"):
        load("resnetv2_50x1_bit", weights=tmp_path / "w.npz")


@pytest.mark.filterwarnings("ignore")
def test_compiled_programs_are_refused(tmp_path):
    path = tmp_path / "program.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    with pytest.raises(InputError, match="a TorchScript program"):
        load(ARCHITECTURE, weights=path)


def test_contents_count_and_not_endings(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(torch_bytes())
    (tmp_path / "w.pth").write_bytes(save(STATE))
    with zipfile.ZipFile(io.BytesIO(torch_bytes())) as old, zipfile.ZipFile(tmp_path / "w.zip", "w", 8) as packed:
        for name in old.namelist():
            packed.writestr(name, old.read(name))
    for name in ("w.safetensors", "w.pth", "w.zip"):
        assert_equal(load(ARCHITECTURE, weights=tmp_path / name).net, STATE)


def test_folders_of_timm_with_torch_or_several_files(tmp_path):
    save_for_hf(NET, str(tmp_path / "bin"), safe_serialization=False)
    assert_equal(load(str(tmp_path / "bin")).net, STATE)
    save_for_hf(NET, str(tmp_path / "shards"), safe_serialization=True)
    (tmp_path / "shards" / "model.safetensors").unlink()
    places = {name: f"model-{len(name) % 2}.safetensors" for name in STATE}
    for file in set(places.values()):
        save_file({name: STATE[name] for name in STATE if places[name] == file}, tmp_path / "shards" / file)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_equal(load(str(tmp_path / "shards")).net, STATE)
    assert_equal(load(ARCHITECTURE, weights=index).net, STATE)
    (tmp_path / "shards" / "model-0.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights file .*model-0\.safetensors"):
        load(str(tmp_path / "shards"))


def test_folders_of_other_libraries(tmp_path):
    folder = tmp_path / "vit"
    folder.mkdir()
    save_file({"classifier.weight": torch.zeros(2, 8)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"has no config\.json; pass the name of its architecture"):
        load(str(folder))
    with pytest.raises(InputError, match=r"it is a folder; pass .*model\.safetensors"):
        load(ARCHITECTURE, weights=folder)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(InputError, match=r"config\.json is not the configuration of a model"):
        load(str(folder))


def test_weights_of_a_network_of_ones_own_are_found_under_a_prefix(tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text(
        "import timm\ndef make(): return timm.create_model('test_resnet', num_classes=2)"
    )
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": under("model.") | {"loss.weight": torch.ones(2)}}, "w.ckpt")
    model = funmatch.load("own_network:make", weights=tmp_path / "w.ckpt")
    assert_equal(model.net, STATE)
    assert "loss.weight" in model.notes[1]


def test_damaged_files_end_in_our_own_error(tmp_path):
    random = np.random.default_rng(0)
    for new in (True, False):
        content = torch_bytes(_use_new_zipfile_serialization=new)
        for _ in range(40):
            damaged = bytearray(content)
            for place in random.integers(0, 12_000, 3):
                damaged[place] ^= 1 << random.integers(8)
            (tmp_path / "w").write_bytes(damaged)
            # A flipped bit of a weight shows nowhere; anything else but this error would be a traceback.
            with contextlib.suppress(InputError):
                load(ARCHITECTURE, weights=tmp_path / "w")


def test_earlier_names_and_addresses_are_answered_with_present_ones(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3).state_dict()
    torch.save(state, tmp_path / "w.pth")
    model = load("vit_tiny_patch16_224_in21k", weights=tmp_path / "w.pth", options=("depth=1",))
    assert "timm calls vit_tiny_patch16_224_in21k vit_tiny_patch16_224" in model.notes[0]
    with pytest.raises(InputError, match=r"pass hf-hub:timm/resnet18\.a1_in1k"):
        load("https://huggingface.co/timm/resnet18.a1_in1k/tree/main")

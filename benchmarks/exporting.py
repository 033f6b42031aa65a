"""Exports networks of many families and compares every export with PyTorch, from the bytes of JPEGs to the class.

    python benchmarks/exporting.py --photos FOLDER [--formats onnx openvino torch-export timm] [--networks NAME …]
        [--out runs/exporting]

`--photos` holds large photographs at any depth, of which each of the first twelve is a class; cuts of their right
halves are the validation images. No weights are downloaded: a network starts from random ones, its BatchNorm statistics
are those of training cuts, and its head separates the classes' mean features, so that outputs are spread as those of a
trained network. Then `funmatch export` writes it, which compares on the decoded images, and the `preprocess` of the
example.py that it wrote reads the JPEG files themselves for the runtime. Prints Markdown.
"""

import argparse
import importlib.util
import platform
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

NETWORKS = (
    "resnet18", "resnet50", "resnet50d", "seresnet50", "resnetv2_50x1_bit", "resnetv2_50d_gn", "nf_resnet50",
    "regnety_004", "densenet121", "inception_v3", "efficientnet_b0", "tf_efficientnet_lite0",
    "tf_efficientnetv2_b0", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100",
    "mobilenetv4_conv_small", "mnasnet_100", "ghostnet_100", "repvgg_a0", "mobileone_s0", "fastvit_t8",
    "repvit_m0_9", "convnext_atto", "convnextv2_atto", "inception_next_atto", "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "maxvit_pico_rw_256",
    "coatnet_pico_rw_224", "mixer_s32_224", "poolformer_s12", "edgenext_xx_small", "mobilevit_xxs", "levit_128s",
    "xcit_nano_12_p16_224", "eva02_tiny_patch14_224", "tiny_vit_5m_224", "efficientvit_b0", "pvt_v2_b0",
    "starnet_s1", "mambaout_femto",
)  # fmt: skip
CLASSES = 12


def separate(net: Any, images: Any, labels: Any) -> None:
    """Gives a network of random weights the statistics of images, and a head that separates their classes."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        net.train()
        for part in images.split(24):
            net(part)
        net.eval()
        # Features are what comes into the head, whatever it is called.
        heads = [module for module in net.modules() if isinstance(module, nn.Linear) and module.out_features == CLASSES]
        found: dict[Any, Any] = {}
        hooks = [
            head.register_forward_pre_hook(lambda module, inputs: found.setdefault(module, []).append(inputs[0]))
            for head in heads
        ]
        for part in images.split(24):
            net(part)
        for hook in hooks:
            hook.remove()
        for head in heads:
            features = torch.cat(found[head]).double()
            centre, scale = features.mean(0), features.std(0) + 1e-3
            white = (features - centre) / scale
            targets = nn.functional.one_hot(labels, CLASSES).double() * 8
            gram = white.T @ white
            # As much as the mean eigenvalue that is not zero: a head that interpolated the images would amplify every
            # rounding, as no trained one does.
            gram += gram.trace() / len(white) * torch.eye(len(gram), dtype=torch.float64)
            weight = torch.linalg.solve(gram, white.T @ targets) / scale[:, None]
            head.weight.copy_(weight.T)
            head.bias.copy_(targets.mean(0) - centre @ weight)


def one(name: str, data: Path, out: Path, formats: list[str]) -> str:
    """Exports a network and compares; returns the row of the table."""
    import timm
    import torch
    from PIL import Image

    import funmatch
    from funmatch.config import Export
    from funmatch.models.classifier import Card, Classifier, timm_config
    from funmatch.models.save import save
    from funmatch.shipping.export import export
    from funmatch.shipping.runtimes import open_runtime
    from funmatch.training.student.trained_model import open_trained_model

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    net = timm.create_model(name, num_classes=CLASSES)
    config = timm_config(net)
    side = config["input_size"][-1]
    files = sorted((data / "train").rglob("*.jpg"))[:: max(1, len(list((data / "train").rglob("*.jpg"))) // 96)]
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    arrays = [np.asarray(Image.open(each).convert("RGB").resize((side, side))) for each in files]
    images = (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255 - mean) / std
    separate(net, images, torch.tensor([int(each.parent.name) for each in files]))
    names = tuple(f"{i:02}" for i in range(CLASSES))
    card = Card(name, side, config["crop_pct"], tuple(config["mean"]), tuple(config["std"]), names)
    classifier = Classifier(net, card, num_classes=CLASSES).eval()
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    save(classifier, folder / "model", card=card, about={})
    model = open_trained_model(str(folder / "model"))
    cells, began = [], time.perf_counter()
    jpegs = sorted((data / "val").rglob("*.jpg"))
    ours = funmatch_classes(model, jpegs)
    for format_name in formats:
        options = Export(
            model=str(folder / "model"), format=(format_name,), out=folder / format_name, data=(str(data),), batch=32
        )
        try:
            result = export.export(options, model, export.data_for(options, model))["formats"][format_name]
        except funmatch.InputError as error:
            cells.append(f"fails: {str(error)[:160]}")
            continue
        cell = f"{result['max_relative']:.0e}, {result['same_top1']:.1%}"
        if format_name in ("onnx", "openvino"):
            spec = importlib.util.spec_from_file_location("example", folder / format_name / "example.py")
            assert spec
            assert spec.loader
            example = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(example)
            runtime = open_runtime(folder / format_name / result["file"])
            theirs = np.concatenate([runtime(example.preprocess(each)[None]) for each in jpegs])
            same = (theirs.argmax(1) == ours.argmax(1)).sum()
            distance = (np.abs(theirs - ours).max(1) / np.abs(ours).max(1)).max()
            cell += f"; from JPEG {same} of {len(jpegs)}, {distance:.0e}"
        cells.append(cell)
    labels = np.array([int(each.parent.name) for each in jpegs])
    top1 = f"{(ours.argmax(1) == labels).mean():.0%}"
    shutil.rmtree(folder)
    return " | ".join([name, str(side), top1, *cells, f"{time.perf_counter() - began:.0f} s"])


def funmatch_classes(model: Any, files: list[Path]) -> Any:
    """Logits of PyTorch for JPEG files, by the decoder and views of this package."""
    import torch

    from funmatch.data.decode import decode

    views = [
        model.preprocessing.view(torch.from_numpy(decode(each.read_bytes(), cap=512).copy())).contiguous()
        for each in files
    ]
    with torch.inference_mode():
        return torch.cat([model.classifier(part) for part in torch.stack(views).split(32)]).numpy()


def main() -> None:
    """Prints the table; each network in a process of its own, so that one that fails does not end it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=["onnx", "openvino", "torch-export", "timm"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("runs/exporting"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = options.out / "cuts"
    if options.one:
        print(one(options.one, data, options.out, options.formats), flush=True)
        return
    if not data.is_dir():
        from benchmarks.resampling import largest_of_each, write_cuts

        write_cuts(largest_of_each(options.photos)[:CLASSES], data, train=4, test=4)
        (data / "test").rename(data / "val")
    print(f"| network | side | top-1 | {' | '.join(options.formats)} | time |")
    print("|---" * (4 + len(options.formats)) + "|")
    for name in options.networks:
        command = [sys.executable, __file__, "--photos", options.photos, "--out", options.out, "--one", name]
        found = subprocess.run([*command, "--formats", *options.formats], capture_output=True, text=True)
        last = (found.stdout.strip().splitlines() or [f"{name} | fails: {found.stderr.strip()[-200:]}"])[-1]
        print(f"| {last} |", flush=True)
    print(f"\n{platform.machine()}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()

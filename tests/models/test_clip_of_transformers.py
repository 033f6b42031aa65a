"""Networks of image and text of transformers against transformers itself, on the same image files."""

import json
from pathlib import Path

import pytest
import torch
from make_images import paint
from PIL import Image
from test_clip import NAMES, assert_equal, logits_of, texts_of

from funmatch.errors import InputError
from funmatch.models.load import load
from funmatch.models.save import save

SENTENCE = "a photo of a {} ."
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", ".", "ant", "bumble", "bee", "cat", "very"]
VISION = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}  # fmt: skip
TEXT = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1,
        "pad_token_id": 0}  # fmt: skip
KINDS = {
    "CLIP": {"projection_dim": 24},
    "Siglip": {},
    "MetaClip2": {"projection_dim": 24},
}


def write_transformers(folder: Path, kind: str) -> Path:
    """A folder of a random network with a tokenizer of a few words, as transformers saves it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_input_names=["input_ids"] if kind == "Siglip" else ["input_ids", "attention_mask"],
    )  # fmt: skip
    fast.save_pretrained(folder)
    width = {"projection_size": 32} if kind == "Siglip" else {"projection_dim": 24}
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | width, vision_config=VISION | width, **KINDS[kind]
    )
    torch.manual_seed(0)
    net = getattr(transformers, f"{kind}Model")(config)
    for parameter in net.parameters():
        if parameter.ndim <= 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    net.save_pretrained(folder)
    size = {"height": 32, "width": 32} if kind == "Siglip" else {"shortest_edge": 32}
    processor = (transformers.SiglipImageProcessor if kind == "Siglip" else transformers.CLIPImageProcessor)(
        size=size, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    return [paint(folder / f"{number}.jpg", number, size) for number, size in enumerate(((90, 131), (200, 61)))]


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", pytest.param("MetaClip2", marks=pytest.mark.slow)])
def test_logits_are_those_of_transformers(kind, tmp_path, photographs):
    import transformers

    folder = write_transformers(tmp_path / "clip", kind)
    texts = texts_of(NAMES, (SENTENCE,))
    ours = logits_of(f"clip:{folder}", photographs, texts)
    net = getattr(transformers, f"{kind}Model").from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    fill = {"padding": "max_length", "max_length": 12} if kind == "Siglip" else {"padding": True}
    given = tokenizer([*texts.all_texts], return_tensors="pt", **fill)
    pixels = images([Image.open(file) for file in photographs], return_tensors="pt")
    with torch.inference_mode():
        theirs = net(**given, **pixels).logits_per_image
    assert_equal(ours, theirs)
    classifier = load(f"clip:{folder}", texts=texts)
    assert any("sigmoid" in note for note in classifier.notes) == (kind == "Siglip")
    (tmp_path / "saved").mkdir()
    save(classifier, tmp_path / "saved", card=classifier.card, about={})
    assert torch.equal(logits_of(str(tmp_path / "saved"), photographs), ours)


def test_what_is_missing_in_a_folder_is_named(tmp_path):
    folder = write_transformers(tmp_path / "clip", "CLIP")
    texts = texts_of(["ant", "very " * 9 + "bee"], (SENTENCE,))
    with pytest.raises(
        InputError, match=r"reads at most 12 tokens of a text, but 1 of 2 classes .* has 17 in 'a photo"
    ):
        load(f"clip:{folder}", texts=texts)
    with pytest.raises(InputError, match=r"reads 'dog' and 'elk' of the test as the same tokens"):
        load(f"clip:{folder}", texts=texts_of(["dog", "ant", "elk"], (SENTENCE,)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "align"}))
    with pytest.raises(InputError, match="is of transformers' type align; clip: takes clip, metaclip_2, siglip"):
        load(f"clip:{folder}")
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"has no tokenizer; copy tokenizer\.json"):
        load(f"clip:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has neither open_clip_config\.json nor a config\.json of transformers"):
        load(f"clip:{folder}")

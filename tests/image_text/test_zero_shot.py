"""Zero-shot classification against a slow implementation, its errors, and pretrained text encoders."""

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer, DistilBertConfig, DistilBertModel

from builders import class_folder, tinted_folder, write
from hf_regvit.data.loading import load_images
from hf_regvit.image_text.network import build_network
from hf_regvit.image_text.zero_shot import class_embeddings, zero_shot
from tiny_image_text import NAMES, arguments

TEMPLATES = ("a {} picture", "{}", "much {} in it")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    network, processor = build_network(arguments(folder / "run", folder), ["a red picture", "blue and green"])
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.encoder.eval(), processor


def test_class_embeddings_equal_their_slow_twin(built):
    encoder, processor = built
    found = class_embeddings(encoder, processor.tokenizer, ["dark_red", "blue"], TEMPLATES)
    for row, name in zip(found.tolist(), ("dark red", "blue"), strict=True):
        total = [0.0] * len(row)
        for template in TEMPLATES:
            tokens = processor.tokenizer(template.replace("{}", name), return_tensors="pt")
            with torch.no_grad():
                vector = encoder.text_projection(encoder.text_model(**tokens).pooler_output)[0].tolist()
            length = math.sqrt(sum(value**2 for value in vector))
            total = [old + value / length for old, value in zip(total, vector, strict=True)]
        length = math.sqrt(sum(value**2 for value in total))
        assert row == pytest.approx([value / length for value in total], abs=1e-5)


def test_zero_shot_equals_its_slow_twin(built, tmp_path):
    encoder, processor = built
    images = load_images(tinted_folder(tmp_path, NAMES, train=5), split="train")
    found = zero_shot(encoder, processor, images, templates=TEMPLATES)
    classes = class_embeddings(encoder, processor.tokenizer, images.label_names, TEMPLATES)
    right = 0
    for record in (images[i] for i in range(len(images))):
        inputs = processor.image_processor(record.image, return_tensors="pt")
        with torch.no_grad():
            vector = encoder.visual_projection(encoder.vision_model(**inputs).pooler_output)[0]
        right += max(range(3), key=lambda label: (vector @ classes[label]).item()) == record.label
    assert (found["top1"], found["images"], found["chance"]) == (right / 15, 15, 1 / 3)
    assert found["interval"][0] <= found["top1"] <= found["interval"][1]


def test_images_that_cannot_be_read_are_left_out(built, tmp_path):
    class_folder(tmp_path, one=3, two=2)
    write(tmp_path / "two" / "z.png", b"broken")
    found = zero_shot(*built, load_images(tmp_path))
    assert found["images"] == 5


def test_images_without_class_names_are_refused(built, tmp_path):
    write(tmp_path / "0.png")
    with pytest.raises(ValueError, match="has no class names"):
        zero_shot(*built, load_images(tmp_path))


def text_folder(folder, kind):
    """Folder of a text encoder with a tokenizer of eight words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green"]
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = BertModel(BertConfig(vocab_size=8, max_position_embeddings=20, **sizes))
    else:
        model = DistilBertModel(DistilBertConfig(vocab_size=8, dim=16, n_layers=1, n_heads=2, hidden_dim=32))
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


def test_a_pretrained_text_encoder_keeps_its_weights(tmp_path):
    source = text_folder(tmp_path / "bert", "bert")
    args = arguments(tmp_path / "run", tmp_path, text_model=str(source), max_text_tokens=6)
    network, processor = build_network(args, [])
    tensors = network.encoder.text_model.state_dict()
    assert all(
        torch.equal(value, tensors[name]) for name, value in BertModel.from_pretrained(source).state_dict().items()
    )
    tokens = processor.tokenizer(["a red green a red green a"], truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 6)
    assert class_embeddings(network.encoder, processor.tokenizer, ["red", "green"], TEMPLATES).shape == (2, 8)


def test_a_text_encoder_without_pooled_output_is_refused(tmp_path):
    source = text_folder(tmp_path / "distilbert", "distilbert")
    args = arguments(tmp_path / "run", tmp_path, text_model=str(source))
    with pytest.raises(ValueError, match=r"\(DistilBertModel\) is not a text encoder with a pooled output"):
        build_network(args, [])


def test_a_vision_model_keeps_its_weights_and_gets_registers(tmp_path):
    from hf_regvit import RegViTModel
    from tiny_image_text import tower

    source = tower(tmp_path / "source", num_register_tokens=0, image_size=32)
    args = arguments(tmp_path / "run", tmp_path, init_from=str(source), num_register_tokens=3, image_size=32)
    network, processor = build_network(args, ["a"])
    vision = network.encoder.vision_model
    assert vision.config.num_register_tokens == 3
    loaded, own = RegViTModel.from_pretrained(source).state_dict(), vision.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.items())
    assert processor.image_processor.crop_size["height"] == 32

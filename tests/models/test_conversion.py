"""Test conversion without `shared`: random models of the installed libraries, and all unsupported sources."""

import argparse
import json
import logging
import pickle
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from builders import MakesFolder, dinov2_state, randomized
from hf_regvit import CheckpointCorruptError, CheckpointError, RegViTForImageClassification, RegViTModel
from hf_regvit.models.conversion import convert, convert_to_folder
from hf_regvit.models.loading import open_backbone
from hf_regvit.models.source_families import ConversionError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


RAW = {"num_attention_heads": 4, "interpolate_antialias": True, "interpolate_offset": 0.0, "layer_norm_eps": 1e-6}


@pytest.mark.parametrize(
    "source",
    [
        ViTModel(ViTConfig(**SMALL, intermediate_size=72)),
        ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=72, num_labels=5)),
        Dinov2ForImageClassification(Dinov2Config(**SMALL, num_labels=3)),
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3, use_swiglu_ffn=True)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_transformers_modules_and_folders(source, tmp_path) -> None:
    randomized(source)
    model = convert(source)  # verify=True compares at two sizes
    source.save_pretrained(tmp_path)
    again = convert(tmp_path)
    assert type(again) is type(model)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels)[0], source(pixels)[0], atol=1e-4, rtol=1e-4)


def test_result_shares_no_memory_with_its_source() -> None:
    source = randomized(ViTModel(ViTConfig(**SMALL)))
    model = convert(source)
    before = source.embeddings.cls_token.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(source.embeddings.cls_token, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_labels_survive() -> None:
    names = {0: "cat", 1: "dog", 2: "horse"}
    config = ViTConfig(**SMALL, id2label=names, label2id={v: k for k, v in names.items()})
    model = convert(randomized(ViTForImageClassification(config)))
    assert isinstance(model, RegViTForImageClassification)
    assert model.config.id2label == names
    assert model.config.pooling == "cls"


@pytest.mark.parametrize(
    "kwargs", [{}, {"reg_tokens": 3}, {"reg_tokens": 3, "no_embed_class": True}, {"global_pool": "avg"}]
)
def test_timm_modules(kwargs) -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    source = timm_vit.VisionTransformer(
        img_size=(32, 48),
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=3,
        dynamic_img_size=True,
        **kwargs,
    )
    model = convert(randomized(source))
    assert model.config.image_size == [32, 48]  # a rectangular stored table
    pixels = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, source(pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_pct": 0.9, "interpolation": "bicubic"},
        {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "center", "mean": (0.5,) * 3, "std": (0.5,) * 3},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"},
        {"crop_pct": 0.96, "crop_mode": "squash", "interpolation": "bicubic"},
        {},
    ],
)
def test_pictures_for_a_model_of_timm_are_prepared_as_by_timm(settings, tmp_path) -> None:
    """Check that the crop follows `crop_pct` (1 for most models at 384 pixels), which affects accuracy."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 96, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 4}
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes).eval()
    source.pretrained_cfg = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 3, "input_size": (3, 96, 96), "mean": (0.4, 0.5, 0.6),
        "std": (0.2,) * 3, **settings,
    }  # fmt: skip
    timm.models.save_for_hf(source, str(tmp_path / "timm"), model_args=sizes)
    convert_to_folder(tmp_path / "timm", tmp_path / "regvit", verify=False)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "regvit", backend="pil")
    settings = timm.data.resolve_data_config({"input_size": (3, 96, 96)}, pretrained_cfg=source.pretrained_cfg)
    expected = timm.data.create_transform(**settings)
    levels = torch.randint(0, 256, (12, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for size in ((200, 120), (90, 150), (96, 96)):  # for odd borders, the crops of both differ by one pixel
        picture = Image.fromarray(levels.numpy()).resize(size)
        found = processor(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(found, expected(picture), atol=1e-5, rtol=0)


@pytest.mark.parametrize("safe", [True, False])
def test_timm_folders_of_either_kind_of_file(tmp_path, safe) -> None:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    source = randomized(timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes).eval())
    timm.models.save_for_hf(source, str(tmp_path), model_args=sizes, safe_serialization=safe)
    assert (tmp_path / "model.safetensors").is_file() == safe
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(convert(tmp_path)(pixels).logits, source(pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"global_pool": "map"}, "attention pooling that skips CLS"),
        ({"global_pool": "prr"}, "'prr'"),
        ({"global_pool": ""}, "a classifier on every token"),
        ({"pos_embed": "none"}, "no positions"),
        ({"attn_layer": "diff"}, "attention DiffAttention"),
        ({"embed_norm_layer": nn.LayerNorm}, "a norm in the patch embedding"),
    ],
)
def test_timm_models_it_cannot_express_are_refused_by_name(kwargs, named) -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    source = timm_vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, **kwargs)
    with pytest.raises(ConversionError, match=named):
        convert(source)


def test_distilled_models_are_refused_by_name() -> None:
    deit = pytest.importorskip("timm.models.deit")
    source = deit.VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4)
    with pytest.raises(ConversionError, match=r"distilled: it has dist_token"):
        convert(source)
    with pytest.raises(ConversionError, match=r"distilled: it has dist_token"):
        convert(dinov2_state() | {"dist_token": torch.zeros(1, 1, 32)}, **RAW)


def test_other_timm_blocks_are_refused_by_name() -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    source = timm_vit.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, block_fn=timm_vit.ParallelScalingBlock
    )
    with pytest.raises(ConversionError, match="ParallelScalingBlock"):
        convert(source)


def test_verification_notices_a_wrong_output() -> None:
    source = randomized(ViTModel(ViTConfig(**SMALL)))
    source.layernorm.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(ConversionError, match="differ"):
        convert(source)
    convert(source, verify=False)


def test_verification_notices_outputs_that_are_not_numbers() -> None:
    source = randomized(ViTModel(ViTConfig(**SMALL)))
    source.layernorm.register_forward_hook(lambda module, args, output: output * torch.tensor(float("nan")))
    with pytest.raises(ConversionError, match=r"differ from those of .* by nan"):
        convert(source)


def test_verification_leaves_the_source_as_it_was() -> None:
    source = randomized(ViTModel(ViTConfig(**SMALL))).train()
    convert(source)
    assert source.training


def test_a_raw_state_dict_with_a_pooler_needs_its_activation(tmp_path) -> None:
    source = randomized(ViTModel(ViTConfig(**SMALL)))
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ConversionError, match="pooler_act, 'tanh' in ViT"):
        convert(tmp_path / "vit.pth", **RAW)
    pixels = torch.randn(1, 3, 32, 32)
    raw = {**RAW, "layer_norm_eps": 1e-12, "interpolate_antialias": False, "interpolate_offset": 0.0}
    model = convert(tmp_path / "vit.pth", **raw, pooler_act="tanh").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).pooler_output, source(pixels).pooler_output, atol=2e-5, rtol=0)


def test_raw_state_dict_says_that_outputs_were_not_compared(caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_regvit.models.conversion"):
        model = convert(dinov2_state(), **RAW)
    assert "outputs were not compared" in caplog.text
    assert isinstance(model, RegViTModel)
    assert model.config.image_size == 32
    assert model.config.num_register_tokens == 2
    assert model.config.use_mask_token


@pytest.mark.parametrize("missing", sorted(RAW))
def test_raw_state_dict_needs_what_shapes_cannot_tell(missing) -> None:
    with pytest.raises(ConversionError, match=missing):
        convert(dinov2_state(), **{key: value for key, value in RAW.items() if key != missing})


def test_override_that_is_no_field_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="num_attention_heads"):
        convert(dinov2_state(), num_attention_head=4)


def test_override_that_contradicts_the_tensors() -> None:
    with pytest.raises(ConversionError, match=r"num_register_tokens=4 .* imply 2"):
        convert(dinov2_state(), **RAW, num_register_tokens=4)


def test_missing_surplus_and_misshapen_tensors_are_named() -> None:
    state = dinov2_state()
    del state["blocks.1.ls2.gamma"]
    with pytest.raises(ConversionError, match=r"layers\.1\.layer_scale2\.lambda1 is missing"):
        convert(state, **RAW)
    with pytest.raises(ConversionError, match=r"rope\.periods has no place"):
        convert(dinov2_state() | {"rope.periods": torch.zeros(4)}, **RAW)
    state = dinov2_state() | {"blocks.0.mlp.fc2.bias": torch.zeros(31)}
    with pytest.raises(ConversionError, match=r"layers\.0\.mlp\.fc2\.bias has shape \(31,\), expected \(32,\)"):
        convert(state, **RAW)


def test_missing_register_tokens_mean_a_model_without_registers() -> None:
    state = dinov2_state()
    del state["register_tokens"]
    assert convert(state, **RAW).config.num_register_tokens == 0


def test_a_table_that_is_not_square_needs_its_size() -> None:
    state = dinov2_state() | {"pos_embed": torch.randn(1, 25, 32)}  # ambiguous: 24 patches and CLS, or 25 patches
    model = convert(state, **RAW, image_size=[32, 48])
    assert model.config.grid == (4, 6)
    state["pos_embed"] = torch.randn(1, 24, 32)
    with pytest.raises(ConversionError, match="image_size"):
        convert(state, **RAW)


def test_linear_classifier_of_the_official_hub_models() -> None:
    state = {f"backbone.{key}": value for key, value in dinov2_state().items()}
    state |= {"linear_head.weight": torch.randn(5, 64), "linear_head.bias": torch.randn(5)}
    model = convert(state, **RAW)
    assert isinstance(model, RegViTForImageClassification)
    assert model.config.pooling == "cls_mean_patch"
    state["linear_head.weight"] = torch.randn(5, 160)  # the four-block head
    with pytest.raises(ConversionError, match="160 features"):
        convert(state, **RAW)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_verification_of_half_precision_is_as_sharp_as_any(dtype, tmp_path) -> None:
    source = randomized(ViTForImageClassification(ViTConfig(**SMALL, num_labels=3))).to(dtype)
    model = convert(source)
    assert model.dtype == source.dtype == dtype
    assert not source.training
    source.save_pretrained(tmp_path)
    assert convert(tmp_path).dtype == dtype
    source.vit.layernorm.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(ConversionError, match="differ"):
        convert(source)


@pytest.mark.parametrize("cls", [ViTForImageClassification, Dinov2ForImageClassification])
def test_a_classifier_without_labels_is_a_backbone(cls, tmp_path) -> None:
    source = randomized(cls(cls.config_class(**SMALL, num_labels=0)))
    assert type(convert(source)) is RegViTModel
    source.save_pretrained(tmp_path)
    assert type(convert(tmp_path)) is RegViTModel


def test_a_backbone_to_train_keeps_the_processor_of_its_classifier(tmp_path) -> None:
    randomized(ViTForImageClassification(ViTConfig(**SMALL, num_labels=3))).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(tmp_path)
    for mask_token in (True, False):
        backbone = open_backbone(str(tmp_path), use_mask_token=mask_token)
        assert list(backbone.image_processor.image_mean) == [0.4] * 3
        assert ("embeddings.mask_token" in backbone.state_dict()) == mask_token


def test_sizes_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match=r"size \[32, 32, 32\] must be one number or a"):
        convert(dinov2_state(), **RAW, image_size=[32, 32, 32])
    with pytest.raises(ConversionError, match=r"patch_size=16 does not match .* which imply 8"):
        convert(dinov2_state(), **RAW, patch_size=16)
    assert convert(dinov2_state(), **RAW, patch_size=[8, 8]).config.patch_size == 8


def test_files(tmp_path) -> None:
    from safetensors.torch import save_file

    state = dinov2_state()
    torch.save({"teacher": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")  # F49: harmless, allowed
    save_file(state, tmp_path / "b.safetensors")
    first, second = (convert(tmp_path / name, **RAW).state_dict() for name in ("a.pth", "b.safetensors"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_f48_malicious_pickle_is_not_run(tmp_path) -> None:
    bad = tmp_path / "bad.pth"
    torch.save({"teacher": MakesFolder(tmp_path / "owned")}, bad)
    with pytest.raises(CheckpointCorruptError, match=r"bad\.pth"):
        convert(bad, **RAW)
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(MakesFolder(tmp_path / "owned")))
    with pytest.raises(CheckpointCorruptError, match=r"raw\.bin"):
        convert(tmp_path / "raw.bin", **RAW)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b"\xff" * 8 + b[8:], lambda b: b"", lambda b: pickle.dumps({"a": 1})],
    ids=["truncated", "huge header", "empty", "pickle renamed"],
)
def test_f42_broken_safetensors_names_the_file(tmp_path, damage) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(dinov2_state(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors"):
        convert(path, **RAW)


def test_folders_and_paths_that_are_none(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        convert(tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        convert(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ConversionError, match=r"config\.json' names neither a model_type .* nor an architecture"):
        convert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises((ConversionError, CheckpointCorruptError)):
        convert(tmp_path)
    with pytest.raises(ConversionError, match="no tensors"):
        convert({"epoch": 3})
    randomized(ViTModel(ViTConfig(**SMALL))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "32"}))
    with pytest.raises(CheckpointError, match=r"cannot be loaded .*hidden_size"):
        convert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(CheckpointCorruptError, match=r"index\.json' is not an index of weights"):
            convert(tmp_path)
    index.write_text('{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises((OSError, CheckpointError), match=r"model-00001-of-00002\.safetensors"):
        convert(tmp_path)
    (tmp_path / "page.pth").write_text("hello, this is the page of a failed download")
    with pytest.raises(CheckpointCorruptError, match=r"page\.pth' is not a plain file of tensors"):
        convert(tmp_path / "page.pth")
    with pytest.raises(NotADirectoryError, match=r"page\.pth' is a file"):
        convert_to_folder(tmp_path, tmp_path / "page.pth")
    for path in ("./owner/name", "../name", "~/name", "owner/name/more", "owner/name.pth"):
        with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
            convert(path)


@pytest.mark.parametrize("name", ["owner/name", "timm/vit_small_patch14_reg4_dinov2.lvd142m", "owner/vit.v1.2"])
def test_hub_id_is_downloaded_without_code_or_pickles(name, tmp_path, monkeypatch) -> None:
    randomized(ViTModel(ViTConfig(**SMALL))).save_pretrained(tmp_path)
    download = Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert isinstance(convert(name), RegViTModel)
    download.assert_called_once_with(name, allow_patterns=["*.json", "*.safetensors"])


def test_a_model_that_the_hub_does_not_give_is_named(monkeypatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    absent = LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nMore words.")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=absent))
    with pytest.raises(FileNotFoundError, match=r"'runs/nope' is neither a local folder .*: Cannot find[^\n]*$"):
        convert("runs/nope")


def test_regvit_folder_is_not_converted_again(tmp_path) -> None:
    convert(dinov2_state(), **RAW).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="already a RegViT"):
        convert(tmp_path)

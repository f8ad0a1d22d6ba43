"""Test `convert` and `convert_back` on every family, on wrapped modules, on state dicts and on folders of OpenCLIP."""

import copy
import json

import peft
import pytest
import safetensors.torch
import timm
import torch
import transformers
from torch import nn

from builders import class_folder, noise, pixels, randomized, save_model, tiny_timm, two_towers, wrapped
from hf_regvit import (
    ConversionError,
    FinetuningArguments,
    RegViTForImageClassification,
    RegViTModel,
    RetrofitError,
    convert,
    convert_back,
    diagnose,
    evaluate_backbone,
    extract_features,
    finetune,
    load_images,
    open_model,
    publish,
    retrofit,
)
from hf_regvit.app.demo_page import MapRequest, results_page
from hf_regvit.app.exploration import Explorer, InputImage
from hf_regvit.models.conversion import convert_to_folder
from hf_regvit.models.processing import UnknownProcessorError, default_image_processor

SIZES = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99,
    "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROPE = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
AXIAL = {"attn_type": "rope", "use_rot_pos_emb": True, "rope_grid_indexing": "xy"}
DINOV3 = {
    "use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True,
    "rope_temperature": 100.0, "num_reg_tokens": 4, "init_values": 0.5, "use_fc_norm": False,
}  # fmt: skip
PE = {**AXIAL, "rope_grid_offset": 1.0, "use_pre_transformer_norm": True}
SWIGLU = {"swiglu_mlp": True, "mlp_ratio": 8 / 3}

# Class of transformers, and fields that differ from `SIZES`.
TRANSFORMERS = {
    "vit": ("ViTForImageClassification", {"num_labels": 5}),
    "vit_of_a_rectangle": ("ViTModel", {"image_size": [32, 48]}),
    "vit_of_rectangular_patches": ("ViTModel", {"patch_size": [8, 4]}),
    "mae": ("ViTMAEModel", {}),
    "msn": ("ViTMSNForImageClassification", {"num_labels": 3}),
    "ijepa": ("IJepaForImageClassification", {"num_labels": 3}),
    "dinov2": ("Dinov2WithRegistersForImageClassification", {"num_register_tokens": 3, "num_labels": 4}),
    "dinov3": ("DINOv3ViTModel", {"num_register_tokens": 2}),
    "dinov3_gated": ("DINOv3ViTBackbone", {"use_gated_mlp": True, "hidden_act": "silu"}),
    "dinov3_without_biases": ("DINOv3ViTModel", {"query_bias": False, "value_bias": False}),
    "dinov3_with_a_bias_of_queries": ("DINOv3ViTModel", {"value_bias": False}),
    "clip": ("CLIPVisionModel", {}),
    "clip_with_projection": ("CLIPVisionModelWithProjection", {"projection_dim": 12}),
    "metaclip_2": ("MetaClip2VisionModel", {}),
    "siglip": ("SiglipVisionModel", {}),
    "siglip_without_a_head": ("SiglipVisionModel", {"vision_use_head": False}),
    "tipsv2": ("Tipsv2VisionModel", {"num_register_tokens": 1}),
}
# Two towers.
TOWERS = ("CLIP", "MetaClip2", "Siglip")
# Class of timm, and arguments; the name of the architecture where it decides what the last layer is.
TIMM = {
    "registers_with_positions": ("VisionTransformer", {"reg_tokens": 2}),
    "no_cls": ("VisionTransformer", {"class_token": False, "reg_tokens": 2, "global_pool": "avg", "fc_norm": False}),
    "norm_of_cls": ("VisionTransformer", {"fc_norm": True}),
    "no_norm": ("VisionTransformer", {"final_norm": False}),
    "rectangular_patches": ("VisionTransformer", {"img_size": (32, 48), "patch_size": (8, 4)}),
    "siglip": ("VisionTransformer", {"class_token": False, "global_pool": "map"}),
    "openclip": ("VisionTransformer", {"pre_norm": True, "architecture": "vit_base_patch16_clip_224"}),
    "eva": ("Eva", {}),
    "eva02_small": ("Eva", {**SWIGLU, **ROPE}),
    "eva02_base": ("Eva", {**SWIGLU, **ROPE, "qkv_fused": False, "scale_mlp": True}),
    "eva02_clip": (
        "Eva",
        {**SWIGLU, **ROPE, "qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True, "global_pool": "token",
         "architecture": "eva02_base_patch16_clip_224"},
    ),
    "dinov3": ("Eva", {**DINOV3, "attn_type": "rope", "qkv_bias": False}),
    "dinov3_with_biases": ("Eva", DINOV3),
    "pe_core": ("Eva", {**PE, "ref_feat_shape": (4, 4), "global_pool": "map", "attn_pool_num_heads": 4}),
    "pe_spatial": ("Eva", {**PE, "ref_feat_shape": (5, 5), "use_post_transformer_norm": False, "use_fc_norm": False}),
    "rope_vit": ("Eva", {**AXIAL, "use_abs_pos_emb": False, "rope_temperature": 100.0}),
    "rope_vit_with_a_table": ("Eva", {**AXIAL, "no_embed_class": True}),
    "sbb_rope": ("Eva", {**ROPE, "class_token": False, "num_reg_tokens": 2}),
}  # fmt: skip


def source_of(library, name):
    """Random model of a family, whose every parameter differs from its initial value."""
    torch.manual_seed(0)
    if library == "towers":
        return randomized(two_towers(name, SIZES))
    if library == "transformers":
        class_name, fields = TRANSFORMERS[name]
        model_class = getattr(transformers, class_name)
        return randomized(model_class(model_class.config_class(**{**SIZES, **fields})))
    kind, changes = TIMM[name]
    architecture = {**changes}.pop("architecture", None)
    changes = {key: value for key, value in changes.items() if key != "architecture"}
    model = randomized(tiny_timm(kind, embed_dim=32, num_heads=2, **changes))
    if architecture:
        model.pretrained_cfg = {"architecture": architecture}
        model.head.bias.data.zero_()
    return model


ALL = [
    *(("transformers", name) for name in TRANSFORMERS), *(("towers", name) for name in TOWERS),
    *(("timm", name) for name in TIMM),
]  # fmt: skip


@pytest.mark.parametrize(("library", "name"), ALL)
def test_every_family_is_converted_exactly_and_back_bit_for_bit(library, name, caplog):
    source = source_of(library, name)
    with caplog.at_level("INFO", logger="hf_regvit.models.conversion_check"):
        model = convert(source)  # compares the outputs at three sizes
    said = [record.getMessage() for record in caplog.records if "conversion_check" in record.name]
    sizes = 1 if "rectang" in name and library != "timm" else 3  # ViT of transformers cannot resample a rectangle
    assert len([line for line in said if "outputs match" in line]) == sizes
    state = source.state_dict()
    back = convert_back(model, like=source)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in state.items())
    # Trained values go back to their places, too: the source with them is converted to the trained model.
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.01 * (number + 1))
    for key, parameter in model.named_parameters():
        if key.endswith("qkv.bias") and not model.config.key_bias:  # parts for which the source has no place
            parameter.data.view(3, -1)[1 : 3 if "bias_of_queries" in name else 2] = 0
    trained = copy.deepcopy(source)
    trained.load_state_dict(convert_back(model, like=source))
    again = convert(trained, verify=False).state_dict()
    if "embeddings.patch_embeddings.projection.bias" not in again or model.config.embedding_norm:
        return  # the bias of the patches is in the positions now; the outputs are compared below
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again[key], value, atol=1e-6, rtol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["clip", "openclip"])
@torch.no_grad()
def test_a_trained_bias_of_the_patches_goes_into_the_positions(name):
    source = source_of("transformers" if name == "clip" else "timm", name)
    model = convert(source, verify=False)
    model.embeddings.patch_embeddings.projection.bias.normal_()
    source.load_state_dict(convert_back(model, like=source))
    expected = model(pixels(2, 32, 32)).last_hidden_state
    found = source.forward_features(pixels(2, 32, 32)) if name == "openclip" else source(pixels(2, 32, 32))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("library", "name"), [("transformers", "dinov3"), ("towers", "CLIP"), ("timm", "pe_core")])
def test_registers_can_be_added_but_not_given_back(library, name):
    source = source_of(library, name)
    model = convert(source, verify=False)
    registers = model.config.num_register_tokens
    model.resize_register_tokens(registers + 2)
    with pytest.raises(
        ConversionError, match=rf"has {registers + 2} registers, but .* has {registers}, so there is no"
    ):
        convert_back(model, like=source)
    with pytest.raises(TypeError, match="is a ViTModel, expected a RegViT"):
        convert_back(source_of("transformers", "vit").vit, like=source)


def test_a_trained_part_without_a_place_in_the_source_is_refused():
    source = source_of("transformers", "dinov3_with_a_bias_of_queries")
    model = convert(source, verify=False)
    model.layers[0].attention.qkv.bias.data.view(3, -1)[1] = 1.0  # of the keys: has no effect
    convert_back(model, like=source)
    model.layers[0].attention.qkv.bias.data.view(3, -1)[2] = 1.0
    with pytest.raises(ConversionError, match=r"part of layers\.0\.attention\.qkv\.bias was trained"):
        convert_back(model, like=source)


def test_a_fine_tuned_classifier_gives_its_tower_back():
    source = source_of("towers", "CLIP")
    tower = convert(source, verify=False)
    model = RegViTForImageClassification(copy.deepcopy(tower.config))
    model.regvit.load_state_dict(tower.state_dict(), strict=False)
    with torch.no_grad():
        model.regvit.layers[0].mlp.fc1.weight.zero_()
    source.load_state_dict(convert_back(model, like=source))
    assert not source.vision_model.encoder.layers[0].mlp.fc1.weight.any()
    assert source.visual_projection.weight.any()


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_folders_of_two_towers(name, tmp_path):
    source = source_of("towers", name)
    source.save_pretrained(tmp_path)
    default_image_processor(32).save_pretrained(tmp_path)
    model = convert(tmp_path)
    assert model.image_processor is not None
    expected = convert(source, verify=False).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    source.load_state_dict(convert_back(model, like=tmp_path))


# --- Wrapped modules ---


@pytest.mark.parametrize("how", ["DataParallel", "AveragedModel", "compiled", "with_compiled_blocks"])
def test_wrappers_are_removed(how):
    source = source_of("transformers", "mae")
    expected = convert(source).state_dict()
    found = convert(wrapped(source, how)).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_adapters_have_to_be_merged_first():
    source = source_of("transformers", "vit").vit
    adapted = peft.get_peft_model(source, peft.LoraConfig(target_modules=["q_proj"]))
    for unmerged in (adapted, adapted.state_dict()):
        with pytest.raises(ConversionError, match="Merge the adapter first"):
            convert(unmerged)
    assert isinstance(convert(adapted.merge_and_unload()), RegViTModel)


def test_quantized_modules_are_refused():
    source = source_of("transformers", "vit").vit
    quantized = torch.ao.quantization.quantize_dynamic(source, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ConversionError, match="is quantized"):
        convert(quantized)


# --- State dicts ---

RAW = {"num_attention_heads": 2, "layer_norm_eps": 1e-6, "interpolate_antialias": True, "interpolate_offset": 0.0}


@pytest.mark.parametrize(
    "prefix",
    [
        "model.", "_orig_mod.", "backbone.", "module.base_encoder.", "teacher.backbone.", "module.model.",
        "visual.trunk.", "encoder.vision_tower.",
    ],
)  # fmt: skip
def test_prefixes_of_state_dicts(prefix):
    source = tiny_timm(embed_dim=32, num_heads=2, num_classes=0)
    state = {prefix + name: tensor for name, tensor in randomized(source).state_dict().items()}
    state |= {f"{prefix}head.0.weight": torch.ones(3, 3)}
    if prefix != "_orig_mod.":
        state |= {"projector.weight": torch.ones(3, 3), "step": torch.ones(1)}
    if prefix.startswith("teacher"):
        state |= {name.replace("teacher", "student"): torch.zeros_like(value) for name, value in state.items()}
    expected = convert(source).state_dict()
    found = convert({"epoch": 3, "model": state}, **RAW).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def official_dinov3(source):
    """State dict with the names of DINOv3's own repository: biases with a mask, periods, and a norm without use."""
    names = {
        "embeddings.register_tokens": "storage_tokens", "embeddings.cls_token": "cls_token",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "layers.": "blocks.", ".attention.": ".attn.",
        ".o_proj.": ".proj.", ".layer_scale1.lambda1": ".ls1.gamma", ".layer_scale2.lambda1": ".ls2.gamma",
        "layernorm.": "norm.", ".mlp.gate_up_proj.": ".mlp.w12.", ".mlp.down_proj.": ".mlp.w3.",
    }  # fmt: skip
    state = {}
    for name, tensor in source.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor.clone()
        if name.endswith("attn.qkv.bias"):
            state[name].view(3, -1)[1] = torch.nan  # as it is initialized; the mask hides it
            state[name.replace("bias", "bias_mask")] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32)
    periods = 100.0 ** (torch.arange(4) / 4)
    return state | {"rope_embed.periods": periods, "local_cls_norm.weight": torch.ones(32)}


@torch.no_grad()
def test_official_dinov3(caplog):
    source = convert(source_of("transformers", "dinov3"), verify=False, use_mask_token=False)
    state = official_dinov3(source)
    state.pop("embeddings.mask_token", None)
    model = convert(state)
    expected = source(pixels(2, 32, 48)).last_hidden_state
    torch.testing.assert_close(model(pixels(2, 32, 48)).last_hidden_state, expected, atol=1e-6, rtol=1e-6)
    assert "rounded" not in caplog.text
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    assert convert(state).config.rope_periods == pytest.approx(state["rope_embed.periods"].tolist())
    assert "periods of the rotary positions are rounded" in caplog.text
    back = convert_back(model, like=state)
    assert all(torch.equal(back[key].nan_to_num(), value.nan_to_num()) for key, value in state.items())


@torch.no_grad()
def test_openclip_state_dict():
    """Compare with the tower of transformers, which stores the same numbers under other names."""
    source = source_of("transformers", "clip_with_projection")
    official = open_clip_state(source)
    with pytest.raises(ConversionError, match=r"does not specify num_attention_heads, hidden_act\."):
        convert(official)
    model = convert(official, num_attention_heads=2, hidden_act="quick_gelu")
    expected = source(pixels(2, 32, 32)).image_embeds
    torch.testing.assert_close(model(pixels(2, 32, 32)).image_embeds, expected, atol=1e-5, rtol=1e-5)
    back = convert_back(model, like=official, num_attention_heads=2, hidden_act="quick_gelu")
    assert all(torch.equal(back[key], value) for key, value in official.items())


@torch.no_grad()
def test_state_dicts_of_timm_with_the_name_of_the_model(tmp_path):
    source = randomized(timm.create_model("test_vit2", num_classes=3, dynamic_img_size=True))
    state = {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}}
    torch.save(state, tmp_path / "checkpoint.pth")
    model = convert_to_folder(tmp_path / "checkpoint.pth", tmp_path / "out", architecture="timm/test_vit2.r160_in1k")
    torch.testing.assert_close(model(pixels(2, 160, 160)).logits, source(pixels(2, 160, 160)), atol=1e-5, rtol=1e-5)
    assert open_model(tmp_path / "out").processor.image_mean[0] == 0.5  # of this model, not of ImageNet
    back = convert_back(model, like=tmp_path / "checkpoint.pth", architecture="test_vit2")
    assert all(torch.equal(back[f"module.{key}"], value) for key, value in source.state_dict().items())

    for wrong, message in (("test_vit", "Missing key"), ("test_vit99", "Unknown model"), ("resnet18", "'resnet18'")):
        with pytest.raises(ConversionError, match=message):
            convert(state, architecture=wrong)
    with pytest.raises(TypeError, match=r"architecture='test_vit2' is for raw state dicts only"):
        convert(source, architecture="test_vit2")


@pytest.mark.parametrize("name", ["eva", "dinov3", "dinov3_with_biases", "pe_core", "rope_vit"])
def test_state_dicts_that_do_not_tell_their_rotation_ask_for_the_name(name):
    with pytest.raises(ConversionError, match=r"names of an Eva of timm.*architecture \(--architecture\), e\.g\."):
        convert(source_of("timm", name).state_dict())


# --- Folders of OpenCLIP ---


def open_clip_folder(folder, vision, state, *, quick_gelu=False, file="open_clip_model.safetensors"):
    config = {
        "model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": {}, "quick_gelu": quick_gelu},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "squash"},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save = safetensors.torch.save_file if file.endswith("safetensors") else torch.save
    save({**state, "logit_scale": torch.ones(()), "text.ln.weight": torch.ones(3)}, folder / file)
    return folder


def open_clip_state(source):
    """State dict of a CLIP tower of transformers with the names of OpenCLIP."""
    names = {
        "vision_model.": "visual.", "embeddings.class_embedding": "class_embedding", "pre_layrnorm": "ln_pre",
        "embeddings.position_embedding.weight": "positional_embedding", "post_layernorm": "ln_post",
        "embeddings.patch_embedding": "conv1", "encoder.layers": "transformer.resblocks", "layer_norm": "ln_",
        "self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    official = {}
    for name, tensor in source.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        official[name if name.startswith("visual.") else f"visual.{name}"] = tensor
    official["visual.proj"] = official.pop("visual.visual_projection.weight").T.contiguous()
    for block in range(2):
        for kind in ("weight", "bias"):
            start = f"visual.transformer.resblocks.{block}.attn."
            parts = [official.pop(f"{start}{part}_proj.{kind}") for part in "qkv"]
            official[f"{start}in_proj_{kind}"] = torch.cat(parts)
    return official


VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 1.5}


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_folders_of_openclip(file, act, tmp_path):
    source = source_of("transformers", "clip_with_projection")
    for layer in source.vision_model.encoder.layers:
        layer.mlp.activation_fn = transformers.activations.ACT2FN[act]
    state = open_clip_state(source)
    folder = open_clip_folder(tmp_path / "clip", VISION, state, quick_gelu=act == "quick_gelu", file=file)
    model = convert(folder)
    output = model(pixels(2, 32, 32))
    torch.testing.assert_close(output.image_embeds, source(pixels(2, 32, 32)).image_embeds, atol=1e-5, rtol=1e-5)
    normed = source.vision_model.post_layernorm(source(pixels(2, 32, 32)).last_hidden_state)  # of all tokens
    torch.testing.assert_close(output.last_hidden_state, normed, atol=1e-5, rtol=1e-5)
    back = convert_back(model, like=folder)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    reader = open_model(folder)  # and every command
    assert reader.description.num_layers == 2
    assert list(reader.processor.image_mean) == [0.1, 0.2, 0.3]
    assert dict(reader.processor.size) == {"height": 32, "width": 32}


@torch.no_grad()
def test_folders_of_openclip_with_a_tower_of_timm(tmp_path):
    tower = randomized(timm.create_model("test_vit2", num_classes=0, global_pool="avg", dynamic_img_size=True))
    projection = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    state = {f"visual.trunk.{key}": value for key, value in tower.state_dict().items()}
    state["visual.head.proj.weight"] = projection
    vision = {"image_size": 160, "timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "linear"}
    model = convert(open_clip_folder(tmp_path / "clip", vision, state))
    found = model(pixels(2, 160, 160)).image_embeds
    torch.testing.assert_close(found, tower(pixels(2, 160, 160)) @ projection.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": [3, 4, 6, 3]}, "a convolutional network"),
        ({"pool_type": "avg"}, "pool_type='avg' after the final norm"),
        ({"act_kwargs": {"beta": 2}}, "act_kwargs={'beta': 2}"),
        ({"timm_model_name": "test_vit2", "timm_proj": "mlp"}, "timm_proj='mlp'"),
        ({"timm_model_name": "hf-hub:someone/else"}, r"Unknown model \(hf-hub:someone/else\)"),
        ({"timm_model_name": "test_vit2", "timm_pool": "most"}, "is not a state dict of the timm model"),
        ({"timm_model_name": 3}, "is not a folder of OpenCLIP with valid"),
        ({"head_width": 0}, "is not a folder of OpenCLIP with valid .*ZeroDivisionError"),
        ({"width": "wide"}, "is not a folder of OpenCLIP with valid"),
        ({"timm_model_name": "test_vit2"}, "is not a state dict of the timm model architecture='test_vit2'"),
    ],
)
def test_folders_of_openclip_that_cannot_be_expressed(change, reason, tmp_path):
    state = open_clip_state(source_of("transformers", "clip_with_projection"))
    with pytest.raises(ConversionError, match=reason):
        convert(open_clip_folder(tmp_path / "clip", {**VISION, **change}, state))


def test_incomplete_folders_of_openclip(tmp_path):
    folder = open_clip_folder(tmp_path / "clip", VISION, {"a": torch.ones(1)})
    (folder / "open_clip_model.safetensors").unlink()
    for text in ("{}", '{"model_cfg": 3}', (folder / "open_clip_config.json").read_text()):
        (folder / "open_clip_config.json").write_text(text)
        with pytest.raises(
            ConversionError, match=r"is not a folder of OpenCLIP with valid open_clip_config\.json and"
        ):
            convert(folder)


# --- Refusals ---

REFUSED = {
    "aimv2": (lambda: transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**SIZES)), "RMSNorm"),
    "pixio": (lambda: transformers.PixioModel(transformers.PixioConfig(**SIZES)), "mean of several class tokens"),
    "radio": (
        lambda: transformers.RadioModel(transformers.RadioConfig(**SIZES, max_img_size=64)),
        "'radio' cannot be converted: it normalizes its pixels in the model, and its summary is made of several class",
    ),
    "naflex": (
        lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**{**SIZES, "num_patches": 16})),
        r"packed patches \(NaFlex\); SigLIP 2 of a fixed resolution can be converted",
    ),
    "beit": (lambda: transformers.BeitModel(transformers.BeitConfig(**SIZES)), "bias for relative positions"),
    "swin": (
        lambda: transformers.SwinModel(transformers.SwinConfig(embed_dim=12, depths=[1], num_heads=[2])),
        "windows",
    ),
    "gelu_gate": (
        lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, use_gated_mlp=True)),
        "gate with another activation than silu",
    ),
    "mixed_rotation": (lambda: tiny_timm("Eva", **AXIAL, rope_type="mixed"), "RotaryEmbeddingMixed"),
    "post_norm": (lambda: tiny_timm("Eva", use_post_norm=True), "EvaBlockPostNorm"),
    "grouped_keys": (lambda: tiny_timm("Eva", **AXIAL, qkv_fused=False, num_kv_heads=1), "fewer heads of keys"),
    "half_a_layer_scale": (lambda: tiny_timm("Eva", init_values=0.1, attn_only_layer_scale=True), "one branch only"),
    "pool_of_registers": (lambda: tiny_timm("Eva", num_reg_tokens=1, global_pool="map"), "reads registers"),
    "swin_of_timm": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    with pytest.raises(ConversionError, match=reason):
        convert(make())


# Models of timm by the names that users know, one for each geometry of a family; None is an exact conversion.
OF_TIMM = {
    **dict.fromkeys((
        "vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3",
        "vit_huge_plus_patch16_dinov3_qkvb", "vit_7b_patch16_dinov3", "vit_tiny_patch16_dinov3_qkvb",  # the last: EUPE
        "vit_small_patch16_lingbot", "vit_giant_patch16_lingbot", "eva02_tiny_patch14_224", "eva02_base_patch14_448",
        "eva02_large_patch14_clip_336", "eva_giant_patch14_224", "eva_giant_patch14_clip_224",
        "vit_pe_core_base_patch16_224", "vit_pe_core_gigantic_patch14_448", "vit_pe_spatial_tiny_patch16_512",
        "vit_pe_spatial_gigantic_patch14_448", "vit_pe_lang_large_patch14_448", "vit_small_patch16_rope_224",
        "vit_base_patch16_rope_ape_224", "vit_mediumd_patch16_rope_reg1_gap_256", "vit_base_patch32_clip_224",
        "vit_base_patch32_clip_quickgelu_224", "vit_base_patch16_siglip_224", "vit_so400m_patch14_siglip_gap_224",
        "vit_giant_patch16_gap_224", "vit_base_patch14_reg1_tipsv2", "vit_so400m_patch16_radio_v4",
        "vit_base_patch14_reg4_dinov2", "deit3_small_patch16_224", "beit3_base_patch16_224", "flexivit_small",
    )),
    "eva02_enormous_patch14_clip_224": "blocks of type EvaBlockPostNorm",
    "vit_small_patch16_rope_mixed_224": "positions of type RotaryEmbeddingMixed",
    "aimv2_large_patch14_224": "norms of type RmsNorm",
    "vit_base_patch16_xp_224": "blocks of type ParallelScalingBlock",
    "vit_base_patch16_rpn_224": "blocks of type ResPostBlock",
    "vit_dwee_patch16_reg1_gap_256": "attention DiffAttention",
    "vit_small_r26_s32_224": "a patch embedding that is not one convolution",
    "vit_base_resnet50d_224": "a patch embedding that is not one convolution",
    "deit_tiny_distilled_patch16_224": "is distilled",
    "naflexvit_base_patch16_siglip": "it takes packed patches",
    "beit_base_patch16_224": "bias for relative positions",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TIMM)
def test_a_model_of_timm_is_converted_exactly_or_refused_with_the_reason(name):
    """Everything but the sizes is that of the released model, such as the reference grid of its rotation."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    fixed = "resnet" in name or "_r26_" in name or "beit_" in name or "naflex" in name
    if not fixed:
        sizes |= {"img_size": 64, "patch_size": 16, "dynamic_img_size": True}
    source = randomized(timm.create_model(name, **sizes))
    if (reason := OF_TIMM[name]) is not None:
        with pytest.raises(ConversionError, match=reason):
            convert(source)
        return
    model = convert(source)  # compares the outputs
    state, back = source.state_dict(), convert_back(model, like=source)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_a_source_that_cannot_run_itself_says_so():
    model = transformers.Dinov2Model(transformers.Dinov2Config(**{**SIZES, "image_size": [32, 48]}))
    with pytest.raises(ConversionError, match=r"itself cannot run at its own size of 32 x 48 .*verify=False"):
        convert(model)
    assert convert(model, verify=False).config.grid == (4, 6)


def test_weights_of_unknown_statistics_need_a_processor(tmp_path):
    source = tiny_timm(embed_dim=32, num_heads=2, num_classes=0)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UnknownProcessorError, match=r"No image processor is known for .*--processor"):
        convert_to_folder(tmp_path / "w.pth", tmp_path / "out", **RAW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnknownProcessorError, match=r"No image processor is known for '.*empty'"):
        convert_to_folder(tmp_path / "w.pth", tmp_path / "out", processor=tmp_path / "empty", **RAW)
    given = default_image_processor(32)
    given.image_mean = [0.1, 0.2, 0.3]
    given.save_pretrained(tmp_path / "given")
    convert_to_folder(tmp_path / "w.pth", tmp_path / "out", processor=tmp_path / "given", **RAW)
    assert list(open_model(tmp_path / "out").processor.image_mean) == [0.1, 0.2, 0.3]


# --- Commands ---


CONVERTED = [("transformers", "dinov3"), ("towers", "CLIP"), ("towers", "Siglip"), ("timm", "pe_core")]


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), CONVERTED)
def test_every_command_works_on_a_converted_model(library, name, tmp_path):
    images = class_folder(tmp_path / "images", cat=16, dog=16)
    folder = str(save_model(convert(source_of(library, name)), tmp_path / "model"))
    source = load_images(str(images))
    reader = open_model(folder)
    assert reader.embed(source.subset(range(3))).shape == (3, 32)
    assert reader.attention_maps(source.subset(range(2)), query=("patch", 1, 2)).shape == (2, 2, 4, 4)
    assert diagnose(folder, source, progress=False).num_images == 32
    assert len(extract_features(reader, source).ids) == 32
    assert evaluate_backbone(folder, str(images), tasks=("knn",)).scores
    view = Explorer({"model": reader}).view(InputImage.of(noise(1), "one"), "model", side=32)
    assert "attention of the selected patch" in results_page({"model": view}, MapRequest(("model",), side=32, layer=2))
    if not reader.description.num_register_tokens:
        with pytest.raises(RetrofitError, match="No distinct outlier population"):  # it has run over the images
            retrofit(folder, source)
    finetune(
        FinetuningArguments(
            model_name_or_path=folder, data=str(images), output_dir=str(tmp_path / "run"), max_steps=1,
            per_device_train_batch_size=4,
        )
    )  # fmt: skip
    assert open_model(tmp_path / "run").embed(source.subset(range(2))).shape == (2, 32)
    assert isinstance(transformers.AutoModel.from_pretrained(tmp_path / "run"), RegViTModel)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), CONVERTED)
def test_a_converted_model_is_published_and_loads_without_this_package(library, name, tmp_path):
    folder = str(save_model(convert(source_of(library, name)), tmp_path / "model"))
    published = publish(folder, "me/model", output_dir=tmp_path / "bundle", card={"license": "apache-2.0"})
    assert published.verification is not None  # a clean process loaded it with the code beside the weights

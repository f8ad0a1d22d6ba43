"""Test token reading (values, cleanup of hooks and modes) and every supported kind of image input."""

import copy
import gc
import importlib
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from builders import noise, normal, state_of, tiny_timm, two_towers, wrapped
from hf_regvit import (
    RegViTBackbone,
    RegViTConfig,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
)
from hf_regvit.data.loading import load_images, stream_images
from hf_regvit.data.preparation import prepare_images
from hf_regvit.evaluation.dense_features import read_dense_features
from hf_regvit.figures.maps import read_token_maps
from hf_regvit.models.families import FAMILIES, describe_model, final_norm, find_tower, has_part
from hf_regvit.models.loading import open_model
from hf_regvit.models.processing import EvaluationTransform, UnknownProcessorError, default_image_processor
from hf_regvit.models.tokens import TokenReader, TokenReading, read_tokens

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
WIDE = {**SIZES, "intermediate_size": 40}
NATIVE, RECTANGLE = (32, 32), (16, 48)


def build(name):
    """Create a tiny model with random weights in which every kind of parameter differs from its initial value."""
    import transformers as t

    torch.manual_seed(0)
    makers = {
        "regvit": lambda: RegViTModel(RegViTConfig(**SIZES, num_register_tokens=3)),
        "regvit_swiglu": lambda: RegViTModel(RegViTConfig(**SIZES, num_register_tokens=1, use_swiglu_ffn=True)),
        "regvit_plain": lambda: RegViTModel(RegViTConfig(**SIZES, num_register_tokens=0, layerscale_value=None)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**SIZES)),
        "dinov2_swiglu": lambda: t.Dinov2Model(t.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
        "dinov2_with_registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2)
        ),
        "dinov3_vit": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**WIDE, num_register_tokens=2)),
        "dinov3_gated": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**WIDE, use_gated_mlp=True)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**WIDE)),
        "deit": lambda: t.DeiTModel(t.DeiTConfig(**WIDE)),
        "clip_vision_model": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**WIDE)),
        "siglip_vision_model": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**WIDE)),
        "ijepa": lambda: t.IJepaModel(t.IJepaConfig(**WIDE)),
        "vit_mae": lambda: t.ViTMAEModel(t.ViTMAEConfig(**WIDE)),
        "vit_msn": lambda: t.ViTMSNModel(t.ViTMSNConfig(**WIDE)),
        "metaclip_2_vision_model": lambda: t.MetaClip2VisionModel(t.MetaClip2VisionConfig(**WIDE)),
        "aimv2_vision_model": lambda: t.Aimv2VisionModel(t.Aimv2VisionConfig(**WIDE, is_native=True, use_head=False)),
        # Towers inside other models
        "regvit_classifier": lambda: RegViTForImageClassification(RegViTConfig(**SIZES, num_register_tokens=2)),
        "regvit_segmenter": lambda: RegViTForSemanticSegmentation(RegViTConfig(**SIZES)),
        "regvit_depth": lambda: RegViTForDepthEstimation(RegViTConfig(**SIZES)),
        "regvit_backbone": lambda: RegViTBackbone(RegViTConfig(**SIZES)),
        "vit_classifier": lambda: t.ViTForImageClassification(t.ViTConfig(**WIDE)),
        "deit_teacher": lambda: t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**WIDE)),
        "dinov3_backbone": lambda: t.DINOv3ViTBackbone(t.DINOv3ViTConfig(**WIDE)),
        "clip": lambda: two_towers("CLIP", WIDE),
        "metaclip_2": lambda: two_towers("MetaClip2", WIDE),
        "siglip": lambda: two_towers("Siglip", WIDE),
        "clip_projection": lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**WIDE)),
        "mae_pretraining": lambda: t.ViTMAEForPreTraining(
            t.ViTMAEConfig(
                **WIDE, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                decoder_intermediate_size=16,
            )
        ),
    }  # fmt: skip
    model = makers[name]()
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        if "norm" in key and key.endswith("weight"):
            parameter.data += 0.5
    return model.eval()


TOWERS = [
    "regvit", "regvit_swiglu", "regvit_plain", "dinov2", "dinov2_swiglu", "dinov2_with_registers", "dinov3_vit",
    "dinov3_gated", "vit", "deit", "clip_vision_model", "metaclip_2_vision_model", "siglip_vision_model", "ijepa",
    "vit_mae", "vit_msn", "aimv2_vision_model",
]  # fmt: skip
INSIDE = {
    "regvit_classifier": "regvit", "regvit_segmenter": "regvit", "regvit_depth": "regvit", "regvit_backbone": "regvit",
    "vit_classifier": "vit", "deit_teacher": "deit", "dinov3_backbone": "dinov3_vit", "clip": "clip_vision_model",
    "siglip": "siglip_vision_model", "clip_projection": "clip_vision_model", "mae_pretraining": "vit_mae",
    "metaclip_2": "metaclip_2_vision_model",
}  # fmt: skip


def own_outputs(model, pixel_values):
    """Return the outputs of the model itself, with eager attention, which returns weights."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    options = {}
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
        cells = pixel_values.shape[-2] * pixel_values.shape[-1] // 64
        options["noise"] = torch.arange(cells).float().expand(len(pixel_values), cells)
    if FAMILIES[model.config.model_type].resize_switch and pixel_values.shape[-2:] != NATIVE:
        options["interpolate_pos_encoding"] = True
    with torch.no_grad():
        return model(pixel_values, output_hidden_states=True, output_attentions=True, **options)


# --- Values ---


@pytest.mark.parametrize("size", [NATIVE, RECTANGLE], ids=["native", "rectangle"])
@pytest.mark.parametrize("name", TOWERS)
def test_residual_and_attention_are_the_models_own(name, size):
    model, pixel_values = build(name).double(), normal(2, 3, *size).double()  # some towers compute softmax in float32
    expected = own_outputs(model, pixel_values)
    read = TokenReader(model).read_many(pixel_values, {"residual": "all", "attention": "all"})
    residual, attention = read["residual"], read["attention"]
    assert residual.layers == (0, 1, 2)
    assert attention.layers == (1, 2)
    assert residual.grid == (size[0] // 8, size[1] // 8)
    for layer in (0, 1, 2):
        torch.testing.assert_close(residual.at(layer), expected.hidden_states[layer], atol=2e-5, rtol=1e-5)
    for layer in (1, 2):
        torch.testing.assert_close(attention.at(layer), expected.attentions[layer - 1], atol=2e-5, rtol=1e-5)
        sums = attention.at(layer).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
    last = residual.at(2)
    if "clip" not in name:  # the last hidden state of CLIP is not normalized
        last = final_norm(model)(last)
    torch.testing.assert_close(last, expected.last_hidden_state, atol=2e-5, rtol=1e-5)


def rebuilt_block(model, pixel_values, layer):
    """Rebuild the output of a block from its input and the values that were read, with plain matrix products."""
    tower, name = find_tower(model)
    family = FAMILIES[name]
    block = tower.get_submodule(family.blocks)[layer - 1]
    attention = block.get_submodule(family.attention)
    sites = {"residual": (layer - 1, layer), "attention": (layer,), "v": (layer,), "mlp": (layer,)}
    read = TokenReader(model).read_many(pixel_values, sites)
    heads = describe_model(model).num_heads
    value = read["v"].at(layer)
    mixed = torch.zeros_like(value)
    width = value.shape[-1] // heads
    for image in range(len(value)):
        for head in range(heads):
            channels = slice(head * width, (head + 1) * width)
            mixed[image, :, channels] = read["attention"].at(layer)[image, head] @ value[image, :, channels]
    outputs = {name: module for name, module in attention.named_modules() if isinstance(module, nn.Linear)}
    output = next(outputs[n] for n in ("o_proj", "out_proj", "proj", "output.dense") if n in outputs)
    last_of_mlp = next(block.get_submodule(path) for path in family.mlp_output if has_part(block, path))
    branches = [output(mixed), last_of_mlp(read["mlp"].at(layer))]
    scales = [("layer_scale1", "ls1"), ("layer_scale2", "ls2")]
    total = read["residual"].at(layer - 1)
    for branch, names in zip(branches, scales):
        scale = next((getattr(block, n) for n in names if getattr(block, n, None) is not None), nn.Identity())
        gain = getattr(scale, "lambda1", getattr(scale, "gamma", 1.0))
        total = total + gain * branch
    return total, read["residual"].at(layer)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_block_can_be_rebuilt_from_what_was_read(name):
    rebuilt, expected = rebuilt_block(build(name), normal(2, 3, *NATIVE), 2)
    torch.testing.assert_close(rebuilt, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_projections_are_those_of_the_normalised_input(name):
    """Compare q, k and v with the weights and the block input: right third of a fused projection, right block."""
    model, pixel_values = build(name), normal(2, 3, *NATIVE)
    tower, kind = find_tower(model)
    block = tower.get_submodule(FAMILIES[kind].blocks)[0]
    norm = next(
        getattr(block, n) for n in ("norm1", "layernorm_before", "layer_norm1", "rms_norm1") if hasattr(block, n)
    )
    attention = block.get_submodule(FAMILIES[kind].attention)
    read = TokenReader(model).read_many(pixel_values, {"residual": (0,), "q": (1,), "k": (1,), "v": (1,)})
    x = norm(read["residual"].at(0))
    for i, site in enumerate("qkv"):
        if hasattr(attention, "qkv"):
            rows = slice(24 * i, 24 * (i + 1))
            expected = x @ attention.qkv.weight[rows].T + attention.qkv.bias[rows]
        else:
            # The second names are those of DINOv2 in older releases of transformers, including 5.17.
            older = {"q": "attention.query", "k": "attention.key", "v": "attention.value"}[site]
            path = f"{site}_proj" if hasattr(attention, f"{site}_proj") else older
            expected = attention.get_submodule(path)(x)
        torch.testing.assert_close(read[site].at(1), expected, atol=2e-5, rtol=1e-5)


TIMM = {
    "plain": {},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "registers_with_positions": {"reg_tokens": 2},
    "no_prefix": {"class_token": False, "global_pool": "avg"},
    "registers_without_cls": {"class_token": False, "reg_tokens": 3, "global_pool": "avg"},
    "norms_of_queries_and_keys": {"qk_norm": True, "init_values": 0.5},
    "norm_before": {"pre_norm": True},
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timm(name, fused):
    model, pixel_values = tiny_timm(noise=0.2, **TIMM[name]), normal(2, 3, *RECTANGLE)
    expected = model.forward_intermediates(pixel_values, return_prefix_tokens=True, intermediates_only=True)
    seen = []
    unfused = copy.deepcopy(model)
    for block in unfused.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    unfused(pixel_values)
    for block in model.blocks:
        block.attn.fused_attn = fused
    read = TokenReader(model).read_many(pixel_values, {"residual": "all", "attention": "all"})
    prefix = int(TIMM[name].get("class_token", True)) + TIMM[name].get("reg_tokens", 0)
    assert read["residual"].num_prefix_tokens == prefix
    assert read["residual"].num_register_tokens == TIMM[name].get("reg_tokens", 0)
    for layer in (1, 2):
        spatial = expected[layer - 1][0] if prefix else expected[layer - 1]
        patches = read["residual"].patches(layer).transpose(1, 2).unflatten(2, (2, 6))
        torch.testing.assert_close(patches, spatial, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(read["attention"].at(layer), seen[layer - 1], atol=2e-5, rtol=1e-5)
    rebuilt, last = rebuilt_block(model, pixel_values, 2)
    torch.testing.assert_close(rebuilt, last, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(final_norm(model)(last), model.forward_features(pixel_values), atol=2e-5, rtol=1e-5)
    assert all(block.attn.fused_attn is fused for block in model.blocks)


EVA = {
    "eva_with_biases_beside_the_weight": {},
    "eva02": {"qkv_fused": False, "use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True},
    "dinov3": {
        "attn_type": "rope", "rope_type": "dinov3", "rope_rotate_half": True, "use_rot_pos_emb": True,
        "use_abs_pos_emb": False, "num_reg_tokens": 4, "init_values": 0.5, "use_fc_norm": False,
    },
    "angles_of_each_block": {
        "attn_type": "rope", "rope_type": "mixed", "use_rot_pos_emb": True, "class_token": False, "num_reg_tokens": 1,
    },
    "fewer_heads_of_keys": {
        "attn_type": "rope", "use_rot_pos_emb": True, "qkv_fused": False, "num_heads": 6, "num_kv_heads": 2,
    },
    "norms_of_queries_and_keys": {"attn_type": "rope", "use_rot_pos_emb": True, "qk_norm": True},
    "norm_after_each_branch": {"use_post_norm": True, "scale_attn_inner": True},
}  # fmt: skip


@pytest.mark.parametrize("name", EVA)
@torch.no_grad()
def test_timm_eva(name):
    """Compare DINOv3, EVA-02 and related timm models with their own unfused attention."""
    changes = {"global_pool": "avg"} | EVA[name]
    model, pixel_values = tiny_timm("Eva", noise=0.2, **changes), normal(2, 3, *RECTANGLE)
    expected = model.forward_intermediates(pixel_values, return_prefix_tokens=True, intermediates_only=True)
    weights, outputs = [], []
    unfused = copy.deepcopy(model)
    for block in unfused.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: weights.append(output))
        block.attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    unfused(pixel_values)
    read = TokenReader(model).read_many(pixel_values, {"residual": "all", "attention": "all", "v": "all", "mlp": (2,)})
    registers = changes.get("num_reg_tokens", 0)
    assert read["residual"].num_register_tokens == registers
    assert read["residual"].num_prefix_tokens == registers + int(changes.get("class_token", True))
    assert read["residual"].grid == (2, 6)
    for layer in (1, 2):
        patches = read["residual"].patches(layer).transpose(1, 2).unflatten(2, (2, 6))
        torch.testing.assert_close(patches, expected[layer - 1][0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(read["attention"].at(layer), weights[layer - 1], atol=2e-5, rtol=1e-5)
        attention = model.blocks[layer - 1].attn
        heads = changes.get("num_heads", 3)
        value = read["v"].at(layer).unflatten(-1, (-1, 24 // heads)).transpose(1, 2)
        serving = [head * value.shape[1] // heads for head in range(heads)]  # value head of each query head
        mixed = read["attention"].at(layer) @ value[:, serving]
        rebuilt = attention.proj(attention.norm(mixed.transpose(1, 2).flatten(2)))
        torch.testing.assert_close(rebuilt, outputs[layer - 1], atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(
        final_norm(model)(read["residual"].at(2)), model.forward_features(pixel_values), atol=2e-5, rtol=1e-5
    )


def test_timm_distilled_and_wrapped_by_transformers():
    from timm.models.deit import VisionTransformerDistilled

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    reading = read_tokens(VisionTransformerDistilled(**sizes).eval(), normal(2, 3, *NATIVE))
    assert (reading.has_cls, reading.num_distillation_tokens, reading.num_register_tokens) == (True, 1, 0)
    assert reading.patches().shape == (2, 16, 24)

    model = tiny_timm(noise=0.2)
    torch.testing.assert_close(
        read_tokens(nn.ModuleDict({"timm_model": model}), normal(2, 3, *NATIVE)).at(2),
        read_tokens(model, normal(2, 3, *NATIVE)).at(2),
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize("name", INSIDE)
def test_towers_are_found_inside_other_models(name):
    model, pixel_values = build(name).double(), normal(2, 3, *NATIVE).double()
    tower, family = find_tower(model)
    assert family == INSIDE[name]
    assert describe_model(model).num_layers == 2
    reading = read_tokens(model, pixel_values, layers="all")
    if hasattr(tower, "set_attn_implementation") and "backbone" not in name:
        expected = own_outputs(tower, pixel_values).hidden_states
        for layer in (0, 1, 2):
            torch.testing.assert_close(reading.at(layer), expected[layer], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_backbones_give_their_own_feature_maps():
    model = build("regvit_backbone")
    expected = model(normal(2, 3, *NATIVE), output_hidden_states=True).hidden_states
    reading = read_tokens(model, normal(2, 3, *NATIVE), layers="all")
    for layer in (0, 1, 2):
        torch.testing.assert_close(reading.at(layer), expected[layer], atol=2e-5, rtol=1e-5)
    model = build("dinov3_backbone")
    maps = model(normal(2, 3, *NATIVE)).feature_maps[-1]
    patches = final_norm(model)(read_tokens(model, normal(2, 3, *NATIVE)).at(2))[:, -16:]
    torch.testing.assert_close(patches.transpose(1, 2).unflatten(2, (4, 4)), maps, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_patch_embeddings_come_before_positions(name):
    model = build(name)
    reading = read_tokens(model, normal(2, 3, *RECTANGLE), site="patch_embedding")
    assert reading.layers == (0,)
    assert reading.at(0).shape == (2, 12, 24)
    assert reading.cls() is None
    assert reading.registers().shape == (2, 0, 24)
    conv = find_tower(model)[0].get_submodule(FAMILIES[find_tower(model)[1]].patch_projection)
    row, column = 1, 4
    patch = normal(2, 3, *RECTANGLE)[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten(1)
    expected = patch @ conv.weight.flatten(1).T + (0 if conv.bias is None else conv.bias)
    torch.testing.assert_close(reading.patches()[:, row * 6 + column], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["regvit", "deit", "siglip_vision_model", "vit_mae", "dinov3_vit", "clip"])
def test_a_batch_of_8_is_8_batches_of_1(name):
    model, batch = build(name), normal(8, 3, *NATIVE)
    sites = {"residual": "all", "attention": (-1,), "k": (-1,), "mlp": (1,), "patch_embedding": "all"}
    together = TokenReader(model).read_many(batch, sites)
    alone = [TokenReader(model).read_many(image[None], sites) for image in batch]
    for site in sites:
        for i, values in enumerate(together[site].values):
            expected = torch.cat([reading[site].values[i] for reading in alone])
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


def test_token_kinds():
    for name, (cls, distillation, registers) in {
        "regvit": (1, 0, 3), "dinov2": (1, 0, 0), "dinov2_with_registers": (1, 0, 2), "deit": (1, 1, 0),
        "siglip_vision_model": (0, 0, 0), "ijepa": (0, 0, 0), "dinov3_vit": (1, 0, 2),
    }.items():  # fmt: skip
        reading = read_tokens(build(name), normal(2, 3, *NATIVE))
        tokens = reading.at(2)
        assert reading.num_prefix_tokens == cls + distillation + registers
        assert (reading.cls() is not None) == bool(cls)
        if cls:
            torch.testing.assert_close(reading.cls(), tokens[:, 0], atol=0, rtol=0)
        first = cls + distillation
        torch.testing.assert_close(reading.registers(), tokens[:, first : first + registers], atol=0, rtol=0)
        torch.testing.assert_close(reading.patches(), tokens[:, first + registers :], atol=0, rtol=0)
        assert reading.patches().shape[1] == 16
    attention = read_tokens(build("regvit"), normal(2, 3, *NATIVE), site="attention")
    assert attention.cls().shape == (2, 3, 20)
    assert attention.registers().shape == (2, 3, 3, 20)
    assert attention.patches().shape == (2, 3, 16, 20)


def test_registers_come_after_a_distillation_token():
    tokens = torch.arange(2 * 8 * 3).reshape(2, 8, 3).float()
    reading = TokenReading("residual", (1,), (tokens,), (2, 2), True, 2, num_distillation_tokens=1)
    assert torch.equal(reading.registers(), tokens[:, 2:4])
    assert torch.equal(reading.patches(), tokens[:, 4:])


def test_regvit_registers_are_the_models_own():
    model = build("regvit")
    reading = read_tokens(model, normal(2, 3, *NATIVE))
    with torch.no_grad():
        output = model(normal(2, 3, *NATIVE))
    norm = final_norm(model)
    torch.testing.assert_close(norm(reading.registers()), output.register_tokens)
    torch.testing.assert_close(norm(reading.cls()), output.pooler_output)


def test_pooled_norms_leave_tokens_alone():
    model = RegViTModel(RegViTConfig(**SIZES, final_norm="pooled", pooling="mean_patch"))
    assert isinstance(final_norm(model), nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(
            read_tokens(model.eval(), normal(2, 3, *NATIVE)).at(2),
            model(normal(2, 3, *NATIVE)).last_hidden_state,
            atol=0,
            rtol=0,
        )


def test_mae_sees_every_patch_in_order_every_time():
    model = build("vit_mae")
    first, second = (read_tokens(model, normal(2, 3, *RECTANGLE)).patches() for _ in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert first.shape == (2, 12, 24)
    assert model.config.mask_ratio == 0.75


def test_layers_are_named_from_both_ends():
    model = build("vit")
    everything = read_tokens(model, normal(2, 3, *NATIVE), layers="all")
    some = read_tokens(model, normal(2, 3, *NATIVE), layers=(-1, 0, -3, 1))
    assert some.layers == (2, 0, 0, 1)
    assert some[1] is some.at(1)
    for layer in (0, 1, 2):
        torch.testing.assert_close(some.at(layer), everything.at(layer), atol=0, rtol=0)
    with pytest.raises(KeyError, match="Block 1 was not read"):
        read_tokens(model, normal(2, 3, *NATIVE)).at(1)


def test_half_precision_models_give_half_precision_tokens():
    model = build("regvit").to(torch.bfloat16)
    reading = TokenReader(model).read_many(normal(2, 3, *NATIVE), {"residual": "all", "attention": (-1,)})
    assert {value.dtype for value in reading["residual"].values} == {torch.bfloat16}
    assert reading["attention"].at(2).dtype == torch.bfloat16
    assert normal(2, 3, *NATIVE).dtype == torch.float32


def test_unusual_native_sizes_are_left_to_the_model():
    """Check that a native size may drop a border, as SigLIP does with 384 pixels in patches of 14."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(SiglipVisionConfig(**{**WIDE, "image_size": 30})).eval()
    assert read_tokens(model, normal(2, 3, 30, 30)).grid == (3, 3)
    with pytest.raises(ValueError, match=r"36 x 30 pixels is not a multiple"):
        read_tokens(model, normal(2, 3, 36, 30))


def test_a_table_of_positions_for_one_size_is_said():
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    model = Aimv2VisionModel(Aimv2VisionConfig(**WIDE, use_head=False)).eval()
    assert read_tokens(model, normal(2, 3, *NATIVE)).grid == (4, 4)
    with pytest.raises(ValueError, match=r"only accepts images of 32 x 32 pixels, not 16 x 48\. Resize the images"):
        read_tokens(model, normal(2, 3, *RECTANGLE))


# --- Reductions and memory ---


def test_reductions_keep_their_results_only():
    model = build("vit")
    full = read_tokens(model, normal(2, 3, *NATIVE), layers="all")
    seen = []

    def norms(values, layer):
        seen.append(layer)
        return values.norm(dim=-1)

    reading = read_tokens(model, normal(2, 3, *NATIVE), layers="all", reduce=norms)
    assert seen == [0, 1, 2]
    for layer in (0, 1, 2):
        torch.testing.assert_close(reading.at(layer), full.at(layer).norm(dim=-1))
    assert reading.patches(2).shape == (2, 16)
    assert reading.cls(2).shape == (2,)
    both = TokenReader(model).read_many(
        normal(2, 3, *NATIVE), {"residual": "all", "attention": (1,)}, reduce={"residual": norms}
    )
    assert both["attention"].at(1).shape == (2, 3, 17, 17)


def test_only_asked_layers_are_kept():
    model = build("vit")
    reading = read_tokens(model, normal(2, 3, *NATIVE), layers=(1,))
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == (2, 17, 24)]
    assert len(alive) == 1
    assert alive[0] is reading.at(1)


@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_a_third_of_a_fused_projection_does_not_keep_the_rest(site):
    values = read_tokens(build("regvit"), normal(2, 3, *NATIVE), site=site).at(2)
    assert values.untyped_storage().nbytes() == values.numel() * 4


# --- Nothing left behind ---


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


SITES = {"residual": "all", "attention": "all", "q": "all", "mlp": "all", "patch_embedding": "all"}


@pytest.mark.parametrize("name", [*TOWERS, "regvit_classifier", "clip"])
def test_models_are_left_as_they_were(name):
    model = build(name)
    model.train()
    part = next(module for name, module in model.named_modules() if "norm" in name)
    part.eval()  # a model may be in training only in parts
    modes = {key: module.training for key, module in model.named_modules()}
    before, config = state_of(model), model.config.to_dict()
    implementation = model.config._attn_implementation
    reading = TokenReader(model).read_many(normal(2, 3, *NATIVE), SITES)
    assert hooks_of(model) == 0
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in part.parameters())
    assert not any(value.requires_grad for site in reading.values() for value in site.values)
    again = TokenReader(model.eval()).read_many(
        normal(2, 3, *NATIVE), SITES
    )  # training mode had no effect on the values (dropout, drop path)
    for site in SITES:
        for one, other in zip(reading[site].values, again[site].values):
            torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["regvit", "vit_mae", "dinov3_vit"])
@pytest.mark.parametrize("where", ["forward", "reduce"])
def test_nothing_is_left_behind_after_an_error(name, where):
    model = build(name).train()
    config = model.config.to_dict()
    tower, kind = find_tower(model)

    fail = Mock(side_effect=RuntimeError("broken on purpose"))

    if where == "forward":
        tower.get_submodule(FAMILIES[kind].blocks)[1].mlp.forward = fail
        with pytest.raises(RuntimeError, match="on purpose"):
            TokenReader(model).read_many(normal(2, 3, *NATIVE), SITES)
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            TokenReader(model).read_many(normal(2, 3, *NATIVE), SITES, reduce={"residual": fail})
    assert hooks_of(model) == 0
    assert all(module.training for module in model.modules())
    assert model.config.to_dict() == config
    assert torch.is_grad_enabled()


def test_hooks_of_others_stay():
    model, calls = build("vit"), []
    model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    read_tokens(model, normal(2, 3, *NATIVE), layers="all")
    assert calls == [1]
    assert hooks_of(model) == 1


# --- Bad input ---


def test_families_that_cannot_be_read():
    from transformers import ConvNextConfig, ConvNextModel, SwinConfig, SwinModel

    small = {"embed_dim": 8, "depths": [1], "num_heads": [2], "image_size": 32, "patch_size": 4, "window_size": 4}
    for model, kind in (
        (SwinModel(SwinConfig(**small)), "swin"),
        (ConvNextModel(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)), "convnext"),
        (nn.Linear(2, 2), "Linear"),
    ):
        with pytest.raises(ValueError, match=rf"model_type '{kind}'.*regvit, dinov2.*Use a plain") as error:
            read_tokens(model, normal(2, 3, *NATIVE))
        assert all(family in str(error.value) for family in FAMILIES)
    with pytest.raises(TypeError, match="To load a folder or Hub id, use open_model"):
        TokenReader("facebook/dinov2-small")
    with pytest.raises(FileNotFoundError, match="'facebook/dinov2-small' is neither a folder nor a model"):
        read_tokens("facebook/dinov2-small", normal(2, 3, *NATIVE))  # a name is opened


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"site": "keys"}, ValueError, "site='keys' is unknown, expected one of residual, attention"),
        ({"layers": (3,)}, ValueError, r"Block 3 does not exist.*2 blocks, 1 to 2, and 0 for the embedding"),
        ({"layers": (-4,)}, ValueError, "Block -4 does not exist"),
        ({"layers": (0,), "site": "k"}, ValueError, r"Block 0 does not exist at site 'k'.*1 to 2; -1"),
        ({"layers": ()}, ValueError, "layers is empty"),
        ({"layers": "last"}, ValueError, "layers='last' is unknown"),
        ({"layers": 2}, TypeError, r"layers=\(2,\)"),
    ],
)
def test_wrong_requests(options, error, message):
    with pytest.raises(error, match=message):
        read_tokens(build("vit"), normal(2, 3, *NATIVE), **options)


def test_wrong_pixels():
    model = build("vit")
    with pytest.raises(ValueError, match=r"36 x 32 pixels is not a multiple of the patch size of 8 x 8.*to 32 x 32"):
        read_tokens(model, normal(2, 3, 36, 32))
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\)"):
        read_tokens(model, normal(2, 3, *NATIVE)[0])
    with pytest.raises(ValueError, match=r"torch.uint8, expected normalized"):
        read_tokens(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"shape \(0, 3, 32, 32\)"):
        read_tokens(model, normal(0, 3, *NATIVE))
    with pytest.raises(TypeError, match="also resizes images of different sizes"):
        read_tokens(model, [normal(2, 3, *NATIVE)[0], normal(2, 3, *RECTANGLE)[0]])
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        read_tokens(tiny_timm(noise=0.2, dynamic_img_size=False), normal(2, 3, *RECTANGLE))


def test_blocks_of_another_kind_are_named():
    from timm.models.vision_transformer import ParallelThingsBlock

    model = tiny_timm(noise=0.2, block_fn=ParallelThingsBlock)
    assert read_tokens(model, normal(2, 3, *NATIVE)).at(2).shape == (2, 17, 24)
    with pytest.raises(ValueError, match=r"no 'attn', so this site cannot be read"):
        read_tokens(model, normal(2, 3, *NATIVE), site="attention")


# --- Images in ---


@pytest.fixture
def folder(tmp_path):
    """Create five images of different sizes and kinds, and three files that are not usable images."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    for i, size in enumerate([(40, 30), (30, 40), (64, 64), (20, 17)]):
        noise(i, size).save(root / f"{i}.png")
    noise(4).convert("L").save(root / "deep" / "grey.png")
    (root / "broken.png").write_bytes(b"not a picture")
    (root / "empty.jpg").write_bytes(b"")
    noise(5, (900, 18)).save(root / "strip.png")
    return root


TRANSFORM = EvaluationTransform.for_model(build("vit"), default_image_processor(32))


def test_folders_skip_and_record_bad_images(folder, caplog):
    prepared = prepare_images(folder, TRANSFORM, batch_size=3)
    assert prepared.total == 8
    batches = list(prepared)
    assert [len(ids) for ids, _ in batches] == [3, 2]
    assert [name for ids, _ in batches for name in ids] == ["0.png", "1.png", "2.png", "3.png", "deep/grey.png"]
    assert all(values.shape[1:] == (3, 32, 32) and values.dtype == torch.float32 for _, values in batches)
    assert {image.id: image.reason for image in prepared.skipped}.keys() == {"broken.png", "empty.jpg", "strip.png"}
    assert "900x18" in next(image.reason for image in prepared.skipped if image.id == "strip.png")
    assert "3 of 8 images were skipped ('broken.png'" in caplog.text
    list(prepared)
    assert len(prepared.skipped) == 3  # counted from scratch, not accumulated


def test_every_kind_of_source_gives_the_same_pixels(folder, tmp_path):
    from datasets import Dataset, Features, IterableDataset
    from datasets import Image as ImageFeature

    names = ["0.png", "broken.png", "1.png", "deep/grey.png"]
    rows = {"image": [{"path": None, "bytes": (folder / name).read_bytes()} for name in names]}
    table = Dataset.from_dict(rows, features=Features({"image": ImageFeature()}))
    table.to_parquet(tmp_path / "train.parquet")
    good = [Image.open(folder / name) for name in names if name != "broken.png"]
    source = load_images(folder, split=None)
    sources = {
        "paths": [folder / name for name in names],
        "strings": [str(folder / name) for name in names],
        "pictures": good,
        "source": source.subset([source.ids.index(name) for name in names]),
        "table": table,
        "rows": table.to_iterable_dataset(),
        "stream": stream_images(tmp_path / "train.parquet"),
        "generator": IterableDataset.from_generator(lambda: ({"image": image, "n": 0} for image in good)),
    }
    values = [np.asarray(image.convert("RGB")) for image in good]
    sources |= {"arrays": values, "tensors": [torch.tensor(array).movedim(-1, 0) for array in values]}
    expected = torch.stack([TRANSFORM(image.convert("RGB")) for image in good])
    memory = ("pictures", "arrays", "tensors", "generator")
    for kind, images in sources.items():
        prepared = prepare_images(images, TRANSFORM, batch_size=2)
        ids, values = zip(*prepared)
        torch.testing.assert_close(torch.cat(values), expected, atol=0, rtol=0, msg=kind)
        assert len([name for batch in ids for name in batch]) == 3
        assert len(prepared.skipped) == (0 if kind in memory else 1), kind
        if kind in ("table", "rows"):
            assert [name for batch in ids for name in batch] == ["row/0", "row/2", "row/3"]
        assert prepared.total == dict.fromkeys(("rows", "stream", "generator")).get(kind, 3 if kind in memory else 4)


def test_no_image_of_use_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"None of the 2 images of .* can be used \('a.png': .*Check the files"):
        list(prepare_images(tmp_path, TRANSFORM))
    with pytest.raises(ValueError, match="None of the 0 images of the list"):
        list(prepare_images([], TRANSFORM))


def test_what_is_no_source_of_images():
    for images in (3, torch.zeros(2, 3, 32, 32), [b"bytes"], {"train": []}):
        with pytest.raises(TypeError, match="expected a folder, a list of paths"):
            prepare_images(images, TRANSFORM)
    with pytest.raises(ValueError, match="batch_size=0 is too small"):
        prepare_images([noise(0)], TRANSFORM, batch_size=0)
    with pytest.raises(ValueError, match="max_images=0 is too small"):
        prepare_images([noise(0)], TRANSFORM, max_images=0)


def test_numbers_of_images():
    pictures = [noise(i) for i in range(10)]

    def ids(**options):
        return [name for batch, _ in prepare_images(pictures, TRANSFORM, **options) for name in batch]

    assert ids(max_images=3) == ["image/0", "image/1", "image/2"]
    drawn = ids(max_images=4, seed=0)
    assert drawn == ids(max_images=4, seed=0) == sorted(drawn)
    assert drawn != ids(max_images=4, seed=1)
    assert len(drawn) == 4
    assert len(ids(max_images=99)) == len(ids(max_images=99, seed=0)) == 10
    assert prepare_images(pictures, TRANSFORM, max_images=4, seed=0).total == 4


def test_a_change_of_size_ends_a_batch():
    model = build("vit")
    transform = EvaluationTransform.for_model(model, default_image_processor(32), keep_aspect=True)
    pictures = [noise(0, (64, 32)), noise(1, (64, 32)), noise(2, (32, 64)), noise(3, (50, 51)), noise(4, (51, 50))]
    shapes = [tuple(values.shape) for _, values in prepare_images(pictures, transform, batch_size=8)]
    assert shapes == [(2, 3, 32, 64), (1, 3, 64, 32), (2, 3, 32, 32)]
    assert read_tokens(model, transform(pictures[0])[None]).grid == (4, 8)


def test_the_statistics_are_the_processors(tmp_path, caplog):
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    model, image = build("vit"), noise(0)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(EvaluationTransform.for_model(model, processor)(image), expected, atol=0, rtol=0)

    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    caplog.clear()
    torch.testing.assert_close(EvaluationTransform.for_model(loaded)(image), expected, atol=0, rtol=0)
    assert not caplog.text
    with pytest.raises(
        UnknownProcessorError, match="none is saved with ViTModel, so the right size, mean and standard"
    ):
        EvaluationTransform.for_model(model)

    resized = EvaluationTransform.for_model(model, processor, image_size=48)
    assert resized(image).shape == (3, 48, 48)
    assert (resized.mean, resized.std) == ((0.5,) * 3, (0.25,) * 3)
    flat = Image.new("RGB", (40, 40), (255, 0, 51))
    whole = EvaluationTransform.for_model(model, processor, keep_aspect=True)
    for each in (resized, whole):
        torch.testing.assert_close(each(flat)[:, 5, 5], torch.tensor([2.0, -2.0, -1.2]))
        assert each.picture(each(flat)).getpixel((3, 3)) == (255, 0, 51)
    assert EvaluationTransform.for_model(model, resized) is resized
    assert resized.description != whole.description


def test_timm_statistics_come_from_its_own_configuration():
    model = tiny_timm(noise=0.2)
    model.pretrained_cfg = {
        "architecture": "vit", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bilinear",
    }  # fmt: skip
    transform = EvaluationTransform.for_model(model)
    torch.testing.assert_close(transform(Image.new("RGB", (50, 60), "white")), torch.ones(3, 32, 32))
    assert describe_model(model).name == "vit"


def test_a_transform_gives_its_statistics_where_another_size_is_asked_for():
    """Regression test for timm transforms: image size and keep_aspect were silently ignored."""
    model = tiny_timm(noise=0.2)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "architecture": "vit"}
    transform = EvaluationTransform.for_model(model)
    image = Image.new("RGB", (90, 60), "white")
    for options, shape in (
        ({}, (3, 32, 32)),
        ({"image_size": 48}, (3, 48, 48)),
        ({"keep_aspect": True}, (3, 32, 48)),
        ({"image_size": 64, "keep_aspect": True}, (3, 64, 96)),
    ):
        given = EvaluationTransform.for_model(model, transform, **options)
        torch.testing.assert_close(given(image), torch.full(shape, 2.0))
        assert (given is transform) == (not options)
    assert read_dense_features(open_model(model, processor=transform), [image]).maps[0].shape == (4, 6, 24)


def test_processors_that_make_no_single_picture(caplog):
    class Tiles:
        image_mean = image_std = [0.5] * 3

        def __call__(self, images, return_tensors):
            return {"pixel_values": torch.zeros(1, 4, 3, 32, 32)}

        def to_json_string(self):
            return "tiles"

    with pytest.raises(ValueError, match=r"Tiles returns pixel_values of shape \(1, 4, 3, 32, 32\)"):
        EvaluationTransform.for_model(build("vit"), Tiles())(noise(0))


def test_two_threads_in_one_model_read_their_own_pictures():
    """Simulate a server: while one reading is in progress, another thread completes a reading of other images."""
    model, mine, others = build("regvit"), normal(2, 3, *NATIVE), normal(2, 3, *NATIVE) + 1
    sites = {"residual": (0, 1, 2), "attention": (1, 2), "mlp": (1,), "patch_embedding": (0,)}
    expected = [TokenReader(model).read_many(values, sites) for values in (mine, others)]
    found = []

    def read_others(module, args):
        handle.remove()
        thread = threading.Thread(target=lambda: found.append(TokenReader(model).read_many(others, sites)))
        thread.start()
        thread.join()

    handle = model.layers[1].register_forward_pre_hook(read_others)
    found.append(TokenReader(model).read_many(mine, sites))
    for readings, wanted in zip(reversed(found), expected, strict=True):
        for site in sites:
            for value, right in zip(readings[site].values, wanted[site].values, strict=True):
                torch.testing.assert_close(value, right, atol=0, rtol=0)


# --- Loading by name ---


@pytest.mark.parametrize("name", ["regvit", "regvit_classifier", "vit_classifier", "clip", "siglip", "vit_mae"])
def test_models_load_from_folders(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    default_image_processor(32).save_pretrained(tmp_path)
    reader = open_model(tmp_path)
    loaded = reader.model
    assert not loaded.training
    assert tuple(reader.processor.image_mean) == (0.485, 0.456, 0.406)
    torch.testing.assert_close(
        read_tokens(loaded, normal(2, 3, *NATIVE)).at(2), read_tokens(model, normal(2, 3, *NATIVE)).at(2)
    )
    assert not hasattr(loaded, "text_model")


def test_timm_models_load_from_folders(tmp_path):
    import json

    import timm
    from safetensors.torch import save_file

    arguments = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments}
    config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reader = open_model(tmp_path)
    loaded = reader.model
    assert reader.transform.mean == (0.5,) * 3
    torch.testing.assert_close(
        read_tokens(loaded, normal(2, 3, *NATIVE)).at(2), read_tokens(model, normal(2, 3, *NATIVE)).at(2)
    )
    assert read_tokens(loaded, normal(2, 3, *RECTANGLE)).grid == (1, 3)


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        open_model(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="'no/such-model' is neither a folder nor a model that can be loaded from the Hub"
    ):
        open_model("no/such-model")
    from transformers import SwinConfig

    SwinConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'swin'"):  # raised before any weights are searched
        open_model(tmp_path)


def test_weights_with_gaps_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    build("vit_classifier").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if key.endswith("layer.1.intermediate.dense.weight"))  # old names on disk
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack vit\.layers\.\d\.mlp\.fc1\.weight.*random"):
        open_model(tmp_path)


def test_a_model_without_processor_says_how_to_give_one(tmp_path):
    build("regvit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
    reader = open_model(tmp_path)
    assert reader.processor is None
    with pytest.raises(UnknownProcessorError, match=r"none is saved with .*Pass processor=\.\.\."):
        reader.transform  # noqa: B018


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b"{", r"config\.json' is not valid JSON text \(.*line 1"),
        ("config.json", b"[1]", r"config\.json' holds a list, expected an object"),
        ("config.json", b'{"model_type": "\xff"}', r"config\.json' is not valid JSON text \(.*utf-8"),
        # The default must not be used instead, because other statistics change the outputs.
        (
            "preprocessor_config.json",
            b"{",
            r"No image processor can be created from '.*preprocessor_config\.json' \(.*or remove it",
        ),
        (
            "preprocessor_config.json",
            b'{"image_processor_type": "Foo"}',
            r"No image processor can be created from '.*preprocessor_config\.json'",
        ),
    ],
)
def test_broken_files_of_a_model_are_named(file, content, said, tmp_path):
    build("regvit").save_pretrained(tmp_path)
    default_image_processor(32).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        open_model(tmp_path)


@pytest.mark.parametrize("name", ["copy", "Trainer", "SomebodysViT"])
def test_a_class_that_is_no_model_is_read_as_its_backbone(name, tmp_path):
    import json

    build("regvit").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [name]}))
    assert type(open_model(tmp_path).model) is RegViTModel


def test_a_processor_without_normalisation():
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(
        size={"height": 32, "width": 32}, do_normalize=False, image_mean=None, image_std=None
    )
    model, flat = build("vit"), Image.new("RGB", (40, 40), (255, 0, 51))
    for options in ({}, {"image_size": 48}, {"keep_aspect": True}):
        transform = EvaluationTransform.for_model(model, processor, **options)
        torch.testing.assert_close(transform(flat)[:, 5, 5], torch.tensor([1.0, 0.0, 0.2]))
        assert transform.picture(transform(flat)).getpixel((3, 3)) == (255, 0, 51)


# --- Wrappers and attentions ---


@pytest.mark.parametrize(
    "how",
    [
        "compiled", "compiled_in_place", "compiled_blocks", "compiled_forward", "compiled_parts",
        "inside_a_compiled_head", "DataParallel", "AveragedModel",
    ],
)  # fmt: skip
@torch.no_grad()
def test_wrapped_models_are_read_like_the_model_itself(how):
    sites = {"residual": "all", "attention": "all", "q": (1,), "mlp": "all", "patch_embedding": (0,)}
    expected = TokenReader(build("regvit")).read_many(normal(2, 3, *NATIVE), sites)
    model = wrapped(build("regvit"), how)
    before = model(normal(2, 3, *NATIVE))  # compiles
    for _ in range(2):
        for site, reading in TokenReader(model).read_many(normal(2, 3, *NATIVE), sites).items():
            for ours, theirs in zip(reading.values, expected[site].values, strict=True):
                torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    torch.testing.assert_close(model(normal(2, 3, *NATIVE))[0], before[0], atol=0, rtol=0)


@torch.no_grad()
def test_a_model_wrapped_for_several_processes_is_read_like_the_model_itself(tmp_path):
    expected = TokenReader(build("regvit")).read(normal(2, 3, *NATIVE), layers="all")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(build("regvit").requires_grad_(True))
        wrapped(normal(2, 3, *NATIVE))
        reading = TokenReader(wrapped).read(normal(2, 3, *NATIVE), layers="all")
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(reading.values, expected.values, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


class TalkingHeads(nn.Module):
    """Attention that mixes the weights of its heads, as in CaiT."""

    def __init__(self, dim, num_heads, **options):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mix = nn.Linear(num_heads, num_heads)

    def forward(self, x, attn_mask=None, is_causal=False):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        weights = self.mix(weights.movedim(1, -1)).movedim(-1, 1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("attention", ["diff", TalkingHeads], ids=["differential", "talking_heads"])
def test_attention_of_an_unknown_formula_is_refused_and_all_else_is_read(attention):
    model = tiny_timm(noise=0.2, attn_layer=attention, num_heads=2)
    reader = TokenReader(model)
    assert not reader.reads_attention
    with pytest.raises(
        ValueError, match=r"weights of (DiffAttention|TalkingHeads) .*formula is not known.*'residual'"
    ):
        reader.read(normal(2, 3, *NATIVE), site="attention")
    read = reader.read_many(normal(2, 3, *NATIVE), {"residual": "all", "q": (1,), "k": (1,), "v": (1,), "mlp": (2,)})
    assert read["q"].at(1).shape == (2, 17, 24)
    maps = read_token_maps(model, normal(2, 3, *NATIVE))
    assert maps[0].attention.shape == (0, 4, 4)


ATTENTIONS = {
    "timm": ("layers.attention.Attention", {}),
    "timm_with_a_gate": ("layers.attention.Attention", {"gated": True, "qkv_bias": True}),
    "timm_with_norms": ("layers.attention.Attention", {"qk_norm": True, "scale_norm": True}),
    "rotary": ("layers.attention.AttentionRope", {"gated": True, "qk_norm": True}),
    "rotary_with_fewer_heads_of_keys": ("layers.attention.AttentionRope", {"qkv_fused": False, "num_kv_heads": 1}),
    "eva": ("models.eva.EvaAttention", {"gated": True}),
    "eva_with_biases_added_later": ("models.eva.EvaAttention", {"qkv_bias_separate": True, "scale_norm": False}),
}


def with_timm_attention(path, **options):
    """Create a model of timm with an attention of this class, which has options that no argument of the model sets."""
    module, _, name = f"timm.{path}".rpartition(".")
    model = tiny_timm("Eva", noise=0.2, attn_type="rope", use_rot_pos_emb=True, global_pool="avg")
    if name == "Attention":
        model = tiny_timm(noise=0.2)
    for block in model.blocks:
        block.attn = getattr(importlib.import_module(module), name)(24, 3, norm_layer=nn.LayerNorm, **options)
    return model.eval()


@pytest.mark.parametrize("name", [*TOWERS, *ATTENTIONS])
@torch.no_grad()
def test_weights_times_values_are_the_output_of_the_attention(name):
    """Hold for every attention that is read: a wrong formula cannot give the output that the module returned."""
    model = with_timm_attention(ATTENTIONS[name][0], **ATTENTIONS[name][1]) if name in ATTENTIONS else build(name)
    reader, outputs = TokenReader(model), []
    assert reader.reads_attention
    attention = reader.tower.get_submodule(reader.family.blocks)[1].get_submodule(reader.family.attention)
    attention.register_forward_hook(lambda module, args, output: outputs.append((args, output)))
    read = reader.read_many(normal(2, 3, *RECTANGLE), {"attention": (2,), "v": (2,)})
    args, output = outputs[0]
    weights = read["attention"].at(2)
    heads = weights.shape[1]
    value = read["v"].at(2).unflatten(-1, (-1, 24 // heads)).transpose(1, 2)
    value = value.repeat_interleave(heads // value.shape[1], dim=1)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    mixed = getattr(attention, "norm", nn.Identity())(mixed)
    if (gate := getattr(attention, "gate", None)) is not None:
        mixed = mixed * gate(args[0]).sigmoid()
    names = ("o_proj", "out_proj", "proj", "output.dense")  # the last one in older transformers
    (project,) = [module for name, module in attention.named_modules() if name in names]
    expected = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(project(mixed), expected, atol=5e-5, rtol=1e-5)

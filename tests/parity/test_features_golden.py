"""Test `read_tokens` against recordings of the reference libraries: `golden/transformers`, `golden/timm`."""

import pytest
import torch

from helpers import assert_golden, load_golden, requires_shared, shared_dir, subtree
from hf_regvit.models.families import describe_model, final_norm
from hf_regvit.models.tokens import TokenReader, read_tokens

pytestmark = requires_shared

TRANSFORMERS = [
    "clip_vision", "deit", "dinov2", "dinov2_swiglu", "dinov2_with_registers", "dinov2_with_registers_backbone",
    "dinov2_with_registers_backbone_raw", "dinov2_with_registers_cls", "dinov2_with_registers_swiglu", "dinov3_vit",
    "dinov3_vit_gated", "siglip_vision", "vit",
]  # fmt: skip
TIMM = ["reg4_avgpool", "reg4_embed_class", "reg4_no_embed_class", "reg4_swiglu"]


def test_every_golden_model_is_read():
    """Check that no golden folder is left out."""
    golden = shared_dir() / "golden"
    assert {path.name for path in (golden / "transformers").iterdir()} == set(TRANSFORMERS)
    assert {path.stem for path in (golden / "timm").glob("*.safetensors")} == set(TIMM)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    import transformers

    tensors, config = load_golden(f"transformers/{name}/io.safetensors", double=True)
    folder = shared_dir() / "golden" / "transformers" / name
    model_class = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    # With sdpa, while the recorded attention weights came from the eager implementation.
    model = model_class.from_pretrained(folder).double()
    num_layers = describe_model(model).num_layers
    compared = 0
    for call in config["calls"]:
        tag = call["tag"]
        if call.get("mask"):
            continue
        read = TokenReader(model).read_many(tensors[f"in.{tag}.pixel_values"], {"residual": "all", "attention": "all"})
        residual, attention = read["residual"], read["attention"]
        assert residual.grid == tuple(call["grid"])
        expected = subtree(tensors, f"out.{tag}.")
        for layer in range(num_layers + 1):
            if f"hidden_states.{layer}" in expected:
                assert_golden(residual.at(layer), expected[f"hidden_states.{layer}"])
                compared += 1
        for layer in range(1, num_layers + 1):
            if f"attentions.{layer - 1}" in expected:
                assert_golden(attention.at(layer), expected[f"attentions.{layer - 1}"])
                compared += 1
        if "last_hidden_state" in expected:
            norm = final_norm(model) if name != "clip_vision" else torch.nn.Identity()
            assert_golden(norm(residual.at(num_layers)), expected["last_hidden_state"])
            compared += 1
        if name == "clip_vision":  # the one family whose final norm is for CLS alone
            assert_golden(final_norm(model)(residual.cls(num_layers)), expected["pooler_output"])
        if "feature_maps.0" in expected:
            compared += check_feature_maps(model, residual, expected)
    assert compared or name == "dinov2_with_registers_cls"
    if name == "dinov2_with_registers_cls":
        for call in config["calls"]:
            reading = read_tokens(model, tensors[f"in.{call['tag']}.pixel_values"])
            norm = final_norm(model)
            pooled = torch.cat([norm(reading.cls()), norm(reading.patches()).mean(1)], dim=1)
            assert_golden(model.classifier(pooled), tensors[f"out.{call['tag']}.logits"])


def check_feature_maps(model, residual, expected):
    for i, stage in enumerate(model.out_features):
        tokens = residual.at(model.stage_names.index(stage))
        if model.config.apply_layernorm:
            tokens = final_norm(model)(tokens)
        if model.config.reshape_hidden_states:
            tokens = tokens[:, residual.num_prefix_tokens :].transpose(1, 2).unflatten(2, residual.grid)
        assert_golden(tokens, expected[f"feature_maps.{i}"])
    return len(model.out_features)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    tensors, config = load_golden(f"timm/{name}.safetensors", double=True)
    arguments = dict(config["model"])
    if arguments.pop("swiglu", False):
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    model = VisionTransformer(**arguments)
    model.load_state_dict(subtree(tensors, "sd."), strict=True)
    model.eval().double()
    for key, pixel_values in subtree(tensors, "in.pixels.").items():
        expected = subtree(tensors, f"out.{key}.")
        reading = read_tokens(model, pixel_values, layers="all")
        norm = final_norm(model)
        assert reading.grid == tuple(side // 8 for side in pixel_values.shape[-2:])
        assert_golden(norm(reading.at(2)), expected["forward_features"])
        for index in (0, 1):
            tokens = norm(reading.at(index + 1)) if config["inter_norm"] else reading.at(index + 1)
            prefix, patches = tokens[:, : reading.num_prefix_tokens], tokens[:, reading.num_prefix_tokens :]
            assert_golden(prefix, expected[f"intermediates.{index}.prefix"])
            assert_golden(
                patches.transpose(1, 2).unflatten(2, reading.grid), expected[f"intermediates.{index}.spatial"]
            )

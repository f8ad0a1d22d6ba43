"""Test the model against official DINOv2, with weights copied by name: positions, masks, gradients, drop path.

Conversion has its own tests and is not used here, so that both cannot be wrong in the same way.
"""

import re

import pytest
import torch

from helpers import assert_golden, golden_files, load_golden, regvit_name, requires_shared, sizes_of, subtree
from hf_regvit import RegViTConfig, RegViTModel

pytestmark = requires_shared

VIT_FILES = [name for name in golden_files("dinov2") if "/vit_" in name and not re.search("droppath|grad", name)]
MASK_FILES = [name for name in VIT_FILES if name.endswith("masks_reg2.safetensors")]


def build(tensors: dict[str, torch.Tensor], arguments: dict, **fields) -> RegViTModel:
    """Create the model of a golden file in double precision; all official tensors are loaded and none is left over."""
    config = RegViTConfig(
        image_size=arguments["img_size"],
        patch_size=arguments["patch_size"],
        hidden_size=arguments["embed_dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        num_register_tokens=arguments["num_register_tokens"],
        layerscale_value=arguments["init_values"],
        interpolate_antialias=arguments["interpolate_antialias"],
        interpolate_offset=arguments["interpolate_offset"],
        use_swiglu_ffn=arguments.get("ffn_layer", "mlp").startswith("swiglu"),
        qkv_bias=arguments.get("qkv_bias", True),
        proj_bias=arguments.get("proj_bias", True),
        mlp_bias=arguments.get("ffn_bias", True),
        drop_path_rate=arguments.get("drop_path_rate", 0.0),
        use_mask_token=True,
        **fields,
    )
    model = RegViTModel(config).eval()
    model.load_state_dict({regvit_name(name): tensor for name, tensor in subtree(tensors, "sd.").items()}, strict=True)
    return model.double()


def test_no_file_is_missing():
    """Check that golden files exist, because an empty list of parameters would skip instead of fail."""
    assert len(VIT_FILES) == 8
    assert len(MASK_FILES) == 1


@pytest.mark.parametrize("name", VIT_FILES)
def test_embedding_at_every_stored_size(name):
    tensors, config = load_golden(name, double=True)
    model = build(tensors, config["model"])
    for size in sizes_of(tensors):
        masks = tensors.get(f"in.masks.{size}")
        with torch.no_grad():
            tokens = model.embeddings(tensors[f"in.pixels.{size}"], None if masks is None else masks.bool())
        assert_golden(tokens, tensors[f"out.{size}.tokens_in"])
        height, width = (int(side) // config["model"]["patch_size"] for side in size.split("x"))
        assert_golden(model.embeddings.resample_positions((height, width)), tensors[f"out.{size}.pos_embed"][:, 1:])


@pytest.mark.parametrize("antialias", [0, 1])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_position_table_at_every_grid(antialias, offset):
    tensors, config = load_golden("dinov2/pos_embed_interp.safetensors")
    table = tensors["sd.pos_embed"]  # (1, 1 + 25, 24)
    model = RegViTModel(
        RegViTConfig(
            image_size=[8 * side for side in config["native"]],
            patch_size=8,
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=1,
            interpolate_antialias=bool(antialias),
            interpolate_offset=offset,
        )
    ).eval()
    model.load_state_dict({"embeddings.position_embeddings": table}, strict=False)
    for rows, columns in config["grids"]:
        expected = tensors[f"out.aa{antialias}.off{offset}.{rows}x{columns}"]
        assert_golden(model.embeddings.resample_positions((rows, columns)), expected[:, 1:])
        with torch.no_grad():  # twice through the cache
            for _ in range(2):
                assert_golden(model.embeddings.patch_positions((rows, columns)), expected[:, 1:])
        assert_golden(table[:, :1], expected[:, :1])


@pytest.mark.parametrize("name", MASK_FILES)
def test_masked_patches(name):
    tensors, config = load_golden(name, double=True)
    model = build(tensors, config["model"])
    for size in sizes_of(tensors):
        with torch.no_grad():
            output = model(
                tensors[f"in.pixels.{size}"],
                bool_masked_pos=tensors[f"in.masks.{size}"].bool(),
                output_hidden_states=True,
            )
        assert_golden(output.hidden_states[0], tensors[f"out.{size}.tokens_in"])
        assert_golden(output.hidden_states[-1], tensors[f"out.{size}.x_prenorm"])
        assert_golden(output.pooler_output, tensors[f"out.{size}.x_norm_clstoken"])
        assert_golden(output.register_tokens, tensors[f"out.{size}.x_norm_regtokens"])
        assert_golden(output.patch_tokens, tensors[f"out.{size}.x_norm_patchtokens"])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_gradient_of_every_parameter(attn_implementation):
    """Compare gradients with masks at a size for which positions are resampled, so gradients pass the resize."""
    tensors, config = load_golden("dinov2/vit_masks_reg2_grad.safetensors", double=True)
    size, model = config["grad_size"], build(tensors, config["model"])
    model.set_attn_implementation(attn_implementation)
    masks = tensors[f"in.masks.{size}"].bool()
    output = model(tensors[f"in.pixels.{size}"], bool_masked_pos=masks, output_hidden_states=True)
    outputs = {
        "x_norm_clstoken": output.pooler_output,
        "x_norm_regtokens": output.register_tokens,
        "x_norm_patchtokens": output.patch_tokens,
        "x_prenorm": output.hidden_states[-1],
    }
    loss = sum((value * tensors[f"in.cotangent.{name}"]).sum() for name, value in outputs.items())
    loss.backward()
    tolerance = {"atol": 1e-4, "rtol": 1e-4}  # stated by the file
    assert_golden(loss.detach()[None], tensors["out.loss"], **tolerance)
    gradients = {regvit_name(name): tensor for name, tensor in subtree(tensors, "grad.").items()}
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_golden(parameter.grad, gradients[name], **tolerance)


def test_batch_subset_drop_path(monkeypatch):
    """Use the permutations of the golden file instead of random ones, in the order of the branches."""
    tensors, config = load_golden("dinov2/vit_droppath_train.safetensors", double=True)
    model = build(tensors, config["model"], drop_path_mode="batch_subset").train()
    permutations = iter(tensors["in.randperm"])
    monkeypatch.setattr(torch, "randperm", lambda size, **_: next(permutations))
    with torch.no_grad():
        output = model(tensors["in.pixels"], output_hidden_states=True)
    assert next(permutations, None) is None
    assert_golden(output.hidden_states[-1], tensors["out.x_prenorm"])
    assert_golden(output.pooler_output, tensors["out.x_norm_clstoken"])
    assert_golden(output.patch_tokens, tensors["out.x_norm_patchtokens"])

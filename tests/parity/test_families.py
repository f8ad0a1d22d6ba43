"""Random-weight models of transformers and timm against RegViT: tokens, blocks, pooled outputs, attention, gradients.

The bar is 2e-5 of the standard deviation of the output, in float32; 0 to 3e-6 was measured.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from family_weights import translate
from safetensors.torch import load_file
from timm.layers import LayerNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from builders import normal, tiny_source, tiny_timm
from helpers import assert_golden, load_golden, requires_shared, shared_dir, subtree
from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.models.modeling_regvit import draw_rotary_augmentation, rotary_table
from hf_regvit.models.tokens import read_tokens

BAR = 2e-5
SIZES = [(32, 32), (48, 24), (56, 64)]  # native, a rectangle of as many patches plus two, a larger one
SHAPE = {"patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
TIMM_SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
# What the sources have in common beside these sizes, in the fields of RegViT.
PLAIN = {"num_register_tokens": 0, "layerscale_value": None, "interpolate_antialias": False, "intermediate_size": 96}
DINOV3 = {
    "use_position_embeddings": False, "rope_theta": 100, "key_bias": False, "layer_norm_eps": 1e-5,
    "num_register_tokens": 4, "layerscale_value": 1.0,
}  # fmt: skip
INDEX = {"rope_theta": 10000, "rope_coordinates": "index"}
PE = {
    **INDEX, "layer_norm_eps": 1e-5, "embedding_norm": True, "num_register_tokens": 0, "rope_grid_offset": 1,
    "rope_reference_grid": [6, 6], "layerscale_value": None, "interpolate_antialias": True,
}  # fmt: skip
EVA02 = {
    **INDEX, "num_register_tokens": 0, "rope_reference_grid": [3, 3], "use_swiglu_ffn": True, "key_bias": False,
    "layerscale_value": None, "intermediate_size": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """A model of another library and the configuration fields that make RegViT compute the same."""

    build: Callable
    fields: dict
    axes: str | None = None  # of interleaved rotary channels
    call: dict = field(default_factory=dict)


def build(class_name: str, **fields) -> Callable:
    """Builder of a model of transformers or timm, by the name of its class."""
    if class_name in ("Eva", "VisionTransformer"):
        return partial(tiny_timm, class_name, **{**TIMM_SHAPE, **fields})
    return partial(tiny_source, class_name, **{**SHAPE, **fields})


OTHER_SIZES = {"interpolate_pos_encoding": True}
EPS5 = partial(LayerNorm, eps=1e-5)
PE_TIMM = {
    "attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True, "ref_feat_shape": (6, 6),
    "rope_grid_offset": 1.0, "rope_grid_indexing": "xy", "norm_layer": EPS5,
}  # fmt: skip
DINOV3_TIMM = {
    "init_values": 1.0, "rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True,
    "use_rot_pos_emb": True, "use_abs_pos_emb": False, "num_reg_tokens": 4, "use_fc_norm": False, "norm_layer": EPS5,
    "global_pool": "token",
}  # fmt: skip
EVA02_TIMM = {
    "mlp_ratio": 4 * 2 / 3, "swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (3, 3),
}  # fmt: skip

GEOMETRIES = {
    "DINOv3": Geometry(
        build("DINOv3ViTModel", intermediate_size=96, num_register_tokens=4), {**DINOV3, "intermediate_size": 96}
    ),
    "DINOv3 gated": Geometry(
        build("DINOv3ViTModel", intermediate_size=96, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
        {**DINOV3, "intermediate_size": 96, "use_swiglu_ffn": True},
    ),
    "DINOv3 without registers and qkv biases": Geometry(
        build("DINOv3ViTModel", intermediate_size=96, query_bias=False, value_bias=False, rope_theta=50.0),
        {**DINOV3, "intermediate_size": 96, "num_register_tokens": 0, "qkv_bias": False, "rope_theta": 50.0},
    ),
    "DINOv3 of timm": Geometry(build("Eva", **DINOV3_TIMM), DINOV3),
    "DINOv3 7B of timm": Geometry(
        build("Eva", **DINOV3_TIMM, qkv_bias=False, mlp_ratio=2, swiglu_mlp=True, swiglu_align_to=64),
        {**DINOV3, "qkv_bias": False, "use_swiglu_ffn": True, "intermediate_size": 128},
    ),
    "CLIP": Geometry(
        build("CLIPVisionModelWithProjection", intermediate_size=96, projection_dim=20),
        {**PLAIN, "embedding_norm": True, "final_norm": "cls", "hidden_act": "quick_gelu", "projection_dim": 20}
        | {"layer_norm_eps": 1e-5},
        call=OTHER_SIZES,
    ),
    "MetaCLIP 2": Geometry(
        build("MetaClip2VisionModelWithProjection", intermediate_size=96, projection_dim=20, hidden_act="gelu"),
        {**PLAIN, "embedding_norm": True, "final_norm": "cls", "projection_dim": 20, "layer_norm_eps": 1e-5},
        call=OTHER_SIZES,
    ),
    "OpenCLIP of timm": Geometry(
        build("VisionTransformer", pre_norm=True, norm_layer=EPS5, global_pool="token"),
        {"num_register_tokens": 0, "embedding_norm": True, "layer_norm_eps": 1e-5, "layerscale_value": None},
    ),
    "SigLIP": Geometry(
        build("SiglipVisionModel", intermediate_size=96),
        {**PLAIN, "use_cls_token": False, "attention_pooler": True, "hidden_act": "gelu_pytorch_tanh"},
        call=OTHER_SIZES,
    ),
    "SigLIP of timm": Geometry(
        build("VisionTransformer", class_token=False, global_pool="map", reg_tokens=2, init_values=1.0),
        {"num_register_tokens": 2, "use_cls_token": False, "attention_pooler": True},
    ),
    "SigLIP gap of timm": Geometry(
        build("VisionTransformer", class_token=False, global_pool="avg", fc_norm=False),
        {"num_register_tokens": 0, "use_cls_token": False, "layerscale_value": None},
    ),
    "MAE": Geometry(
        build("ViTMAEModel", intermediate_size=96, mask_ratio=0.0),
        {**PLAIN, "layer_norm_eps": 1e-12},
        call=OTHER_SIZES,
    ),
    "MSN": Geometry(build("ViTMSNModel", intermediate_size=96), PLAIN, call=OTHER_SIZES),
    "I-JEPA": Geometry(
        build("IJepaModel", intermediate_size=96, layer_norm_eps=1e-6),
        {**PLAIN, "use_cls_token": False},
        call=OTHER_SIZES,
    ),
    "TIPSv2": Geometry(
        build("Tipsv2VisionModel"),
        {"num_register_tokens": 1, "layerscale_value": 1.0, "interpolate_mode": "bilinear"}
    ),
    "Pixio": Geometry(
        build("PixioModel", n_cls_tokens=4),
        {"num_register_tokens": 3, "no_embed_class": True, "layerscale_value": None, "interpolate_antialias": False},
    ),
    "C-RADIO": Geometry(
        build("RadioModel", image_size=32, max_img_size=64),
        {"num_register_tokens": 9, "no_embed_class": True, "final_norm": "none", "interpolate_mode": "radio"}
        | {"interpolate_antialias": False, "image_size": 64, "layerscale_value": 1.0},
    ),
    "EVA": Geometry(build("Eva"), {**PLAIN, "intermediate_size": 192, "key_bias": False, "final_norm": "pooled"}
                    | {"interpolate_antialias": True}),
    "EVA-02 S": Geometry(build("Eva", **EVA02_TIMM), {**EVA02, "final_norm": "pooled"}, axes="ij"),
    "EVA-02 B": Geometry(
        build("Eva", **EVA02_TIMM, qkv_fused=False, scale_mlp=True),
        {**EVA02, "final_norm": "pooled", "mlp_norm": True},
        axes="ij",
    ),
    "EVA-02-CLIP": Geometry(
        build("Eva", **EVA02_TIMM, qkv_fused=False, scale_mlp=True, scale_attn_inner=True, global_pool="token"),
        {**EVA02, "mlp_norm": True, "attention_norm": True},
        axes="ij",
    ),
    "PE-Core": Geometry(
        build("Eva", **PE_TIMM, global_pool="map", attn_pool_num_heads=6, attn_pool_mlp_ratio=2.0),
        {**PE, "attention_pooler": True, "pooler_num_heads": 6, "pooler_intermediate_size": 96},
        axes="xy",
    ),
    "PE-Core G": Geometry(
        build("Eva", **{**PE_TIMM, "rope_grid_offset": 0.0}, class_token=False, global_pool="map",
              attn_pool_num_heads=6),
        {**PE, "rope_grid_offset": 0, "use_cls_token": False, "attention_pooler": True, "pooler_num_heads": 6},
        axes="xy",
    ),
    "PE-Spatial": Geometry(
        build("Eva", **PE_TIMM, use_post_transformer_norm=False, use_fc_norm=False, global_pool="token",
              init_values=0.1),
        {**PE, "final_norm": "none", "layerscale_value": 0.1},
        axes="xy",
    ),
    "RoPE-ViT": Geometry(
        build("Eva", attn_type="rope", use_rot_pos_emb=True, rope_grid_indexing="xy", rope_temperature=100.0,
                 no_embed_class=True, global_pool="token"),
        {"rope_theta": 100, "rope_coordinates": "index", "no_embed_class": True, "num_register_tokens": 0}
        | {"layerscale_value": None},
        axes="xy",
    ),
    "SBB rope of timm": Geometry(
        build("Eva", class_token=False, num_reg_tokens=1, use_rot_pos_emb=True, use_abs_pos_emb=False,
                 ref_feat_shape=(4, 4), init_values=0.1),
        {**INDEX, "rope_reference_grid": [4, 4], "use_cls_token": False, "num_register_tokens": 1, "key_bias": False}
        | {"use_position_embeddings": False, "final_norm": "pooled", "layerscale_value": 0.1},
        axes="ij",
    ),
}  # fmt: skip


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with every gain, bias, token and table far from its initial value, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim < 2 else min(0.3, 1 / math.sqrt(parameter.shape[-1]))
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pair_of(name: str) -> tuple[torch.nn.Module, RegViTModel]:
    """The source with random weights and a RegViT with the same weights."""
    geometry = GEOMETRIES[name]
    torch.manual_seed(0)
    source = randomized(geometry.build())
    config = RegViTConfig(**{"image_size": 32, **SHAPE, **geometry.fields})
    model = RegViTModel(config).eval()
    model.load_state_dict(translate(source.state_dict(), config, axes=geometry.axes))
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters()
    return source, model


def raw_pixels(name: str, source: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels that become `pixels` where the source normalizes them by itself."""
    if name != "C-RADIO":
        return pixels
    return pixels * source.input_conditioner.norm_std + source.input_conditioner.norm_mean


def outputs_of(name: str, source: torch.nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens, pooled output and blocks of the source."""
    if isinstance(source, Eva | VisionTransformer):
        tokens = source.forward_features(pixels)
        blocks, handles = {}, []
        for i, block in enumerate(source.blocks, start=1):
            handles.append(block.register_forward_hook(lambda *call, i=i: blocks.__setitem__(f"block {i}", call[2])))
        source.forward_features(pixels)
        for handle in handles:
            handle.remove()
        return {"tokens": tokens, "pooled": source.forward_head(tokens, pre_logits=True), **blocks}
    call = dict(GEOMETRIES[name].call)
    if name == "MAE":
        call["noise"] = torch.arange(pixels.shape[-1] * pixels.shape[-2] // 64).expand(len(pixels), -1).float()
    output = source(raw_pixels(name, source, pixels), output_hidden_states=True, **call)
    blocks = {f"block {i}": state for i, state in enumerate(output.hidden_states)}
    pooled = {}
    if "image_embeds" in output:
        pooled = {"embeds": output.image_embeds}
    elif name in ("DINOv3", "DINOv3 gated", "SigLIP", "TIPSv2"):
        pooled = {"pooled": output.pooler_output}
    return {"tokens": output.last_hidden_state, **pooled, **blocks}


def ours(output) -> dict[str, torch.Tensor]:
    blocks = {f"block {i}": state for i, state in enumerate(output.hidden_states)}
    return {
        "tokens": output.last_hidden_state,
        "pooled": output.pooler_output,
        "embeds": output.image_embeds,
        **blocks,
    }


def assert_equal(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    error = ((found - expected).abs().max() / expected.std()).item()
    assert error < BAR, f"{what}: {error:.1e} of the standard deviation"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_family_alone_at_three_sizes(name):
    source, model = pair_of(name)
    for size in SIZES:
        pixels = normal(2, 3, *size, seed=1)
        with torch.no_grad():
            expected, found = outputs_of(name, source, pixels), ours(model(pixels, output_hidden_states=True))
        assert len(expected) > 3
        for what, tensor in expected.items():
            assert_equal(found[what], tensor, f"{what} at {size}")


@pytest.mark.parametrize("name", GEOMETRIES)
def test_family_in_a_padded_batch(name):
    source, model = pair_of(name)
    height, width = max(h for h, _ in SIZES), max(w for _, w in SIZES)
    pixels, mask = torch.zeros(3, 3, height, width), torch.zeros(3, height, width, dtype=torch.long)
    for i, (rows, columns) in enumerate(SIZES):
        pixels[i, :, :rows, :columns], mask[i, :rows, :columns] = normal(3, rows, columns, seed=i), 1
    with torch.no_grad():
        output = model(pixels, pixel_mask=mask)
        prefix = model.config.num_prefix_tokens
        real = output.patch_mask | (torch.arange(output.patch_mask.shape[1]) < prefix)
        for i, (rows, columns) in enumerate(SIZES):
            expected = outputs_of(name, source, pixels[i : i + 1, :, :rows, :columns])
            assert_equal(output.last_hidden_state[i, real[i]], expected["tokens"][0], f"tokens of {rows} x {columns}")
            for what, found in (("pooled", output.pooler_output), ("embeds", output.image_embeds)):
                if what in expected:
                    assert_equal(found[i], expected[what][0], f"{what} of {rows} x {columns}")


@pytest.mark.parametrize("name", GEOMETRIES)
def test_attention_weights_of_a_family(name):
    """In double precision: in float32, the scores of random weights alone are uncertain by half of the bar."""
    source, model = (one.double() for one in pair_of(name))
    pixels = normal(1, 3, 32, 32, seed=1).double()
    reading = read_tokens(model, pixels, layers="all", site="attention")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(pixels, output_attentions=True).attentions
    if isinstance(source, Eva | VisionTransformer):
        expected = read_tokens(source, pixels, layers="all", site="attention").values
    else:
        source.set_attn_implementation("eager")
        call = {"noise": torch.arange(16).expand(1, -1).float()} if name == "MAE" else {}
        with torch.no_grad():
            expected = source(raw_pixels(name, source, pixels), output_attentions=True, **call).attentions
    for block, (one, other, read) in enumerate(zip(found, expected, reading.values, strict=True)):
        assert_equal(one, other, f"attention of block {block}")
        assert_equal(read, other, f"attention of block {block} from read_tokens")


@pytest.mark.parametrize("name", ["DINOv3", "DINOv3 gated", "PE-Core", "CLIP", "SigLIP"])
def test_gradients_of_a_family(name):
    """In double precision, since sums over all tokens lose digits in float32."""
    source, model = (one.double() for one in pair_of(name))
    inputs = [normal(2, 3, 48, 24, seed=1).double().requires_grad_() for _ in range(2)]
    expected, found = outputs_of(name, source, inputs[0]), ours(model(inputs[1], output_hidden_states=True))
    read = ["tokens", *({"pooled", "embeds"} & expected.keys())]
    for outputs in (expected, found):
        sum((outputs[what] * normal(*outputs[what].shape, seed=5)).sum() for what in read).backward()
    assert_equal(inputs[1].grad, inputs[0].grad, "pixels")
    gradients = {
        key: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for key, tensor in source.named_parameters()
    }
    gradients = translate(gradients, model.config, axes=GEOMETRIES[name].axes)
    for key, parameter in model.named_parameters():
        # An unrotated key bias has a gradient of 0 up to rounding, and some sources have no patch bias.
        if not key.endswith("qkv.bias") and key in gradients and gradients[key].any():
            assert_equal(parameter.grad, gradients[key], key)
    if not model.config.key_bias:
        width = model.config.hidden_size
        for block, layer in enumerate(model.layers):
            query, key, value = layer.attention.qkv.bias.grad.split(width)
            assert not key.any()
            reference = gradients[f"layers.{block}.attention.qkv.bias"].split(width)
            assert_equal(query, reference[0], f"query bias of block {block}")
            assert_equal(value, reference[2], f"value bias of block {block}")


def test_coordinates_of_training_are_drawn_like_those_of_transformers():
    fields = {"pos_embed_shift": 0.3, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}
    GEOMETRIES["augmented"] = Geometry(
        build("DINOv3ViTModel", intermediate_size=96, num_register_tokens=4, **fields),
        {**DINOV3, "intermediate_size": 96, **fields},
    )
    try:
        source, model = pair_of("augmented")
    finally:
        del GEOMETRIES["augmented"]
    pixels, outputs = normal(2, 3, 48, 24, seed=1), []
    for one in (source, model):
        torch.manual_seed(7)
        with torch.no_grad():
            outputs.append(one.train()(pixels).last_hidden_state)
    assert_equal(outputs[1], outputs[0], "tokens in training")
    with torch.no_grad():
        assert (model(pixels).last_hidden_state - outputs[0]).abs().max() > 0.1  # another draw
        assert_equal(model.eval()(pixels).last_hidden_state, source.eval()(pixels).last_hidden_state, "evaluation")


def table_in_loops(config: RegViTConfig, grid: tuple[int, int], shift=(0, 0), factor=(1, 1)) -> torch.Tensor:
    """Slow twin of `rotary_table`, one angle at a time in double precision."""
    rows = []
    bands = config.head_dim // 4
    for place in ((row, column) for row in range(grid[0]) for column in range(grid[1])):
        angles = []
        for axis in (0, 1):
            if config.rope_coordinates == "centered":
                coordinate = ((place[axis] + 0.5) / grid[axis] * 2 - 1 + shift[axis]) * factor[axis] * 2 * math.pi
            else:
                coordinate = place[axis] + config.rope_grid_offset
                if config.rope_reference_grid:
                    coordinate *= config.rope_reference_grid[axis] / grid[axis]
            for band in range(bands):
                period = config.rope_theta ** (4 * band / config.head_dim)
                angles.append(coordinate / (config.rope_periods[band] if config.rope_periods else period))
        rows.append([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles])
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_theta": 7.5, "rope_periods": [1.0, 2.5, 7.0, 30.0]},
        INDEX,
        {**INDEX, "rope_grid_offset": 1, "rope_reference_grid": [4, 6]},
    ],
    ids=["centered", "periods", "index", "reference"],
)
def test_rotary_table_equals_the_loop(fields):
    config = RegViTConfig(**{**SHAPE, "image_size": 32, "rope_theta": 100, **fields})
    for grid in ((4, 4), (3, 7), (1, 1)):
        table = rotary_table(config, grid, torch.device("cpu"))
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, table_in_loops(config, grid), atol=2e-5, rtol=0)


def test_augmented_table_equals_the_loop():
    fields = {"rope_theta": 100, "pos_embed_shift": 0.2, "pos_embed_jitter": 1.3, "pos_embed_rescale": 2.0}
    config = RegViTConfig(**{**SHAPE, "image_size": 32, **fields})
    torch.manual_seed(0)
    shift, factor = draw_rotary_augmentation(config, torch.device("cpu"))
    assert shift.abs().max() <= 0.2
    assert 1 / 2.6 <= factor.min() < factor.max() <= 2.6
    assert factor[0] != factor[1]
    table = rotary_table(config, (3, 5), torch.device("cpu"), (shift, factor))
    torch.testing.assert_close(
        table, table_in_loops(config, (3, 5), shift.tolist(), factor.tolist()), atol=5e-5, rtol=0
    )


# --- Golden files ---

GOLDEN = {
    "clip_vision": {**GEOMETRIES["CLIP"].fields, "projection_dim": None},
    "siglip_vision": GEOMETRIES["SigLIP"].fields,
    "dinov3_vit": {**DINOV3, "use_mask_token": True, "num_hidden_layers": 3},
    "dinov3_vit_gated": {**DINOV3, "num_register_tokens": 1, "use_swiglu_ffn": True},
}


@requires_shared
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_of_families(name):
    folder = f"transformers/{name}"
    fields = {"num_hidden_layers": 2, **GOLDEN[name], "image_size": 40, "intermediate_size": 184}
    config = RegViTConfig(**{**SHAPE, **fields})
    model = RegViTModel(config).eval()
    weights = load_file(shared_dir() / "golden" / folder / "model.safetensors")
    model.load_state_dict(translate(weights, config))
    model.double().set_attn_implementation("eager")
    tensors, _ = load_golden(f"{folder}/io.safetensors", double=True)
    for tag in sorted({key.split(".")[1] for key in tensors if key.startswith("in.")}):
        masked = tensors.get(f"in.{tag}.bool_masked_pos")
        with torch.no_grad():
            output = model(
                tensors[f"in.{tag}.pixel_values"],
                bool_masked_pos=None if masked is None else masked.bool(),
                output_hidden_states=True,
                output_attentions=True,
            )
        expected = subtree(tensors, f"out.{tag}.")
        assert_golden(output.last_hidden_state, expected.pop("last_hidden_state"))
        assert_golden(output.pooler_output, expected.pop("pooler_output"))
        for key, tensor in expected.items():
            field_name, block = key.split(".")
            assert_golden(output[field_name][int(block)], tensor)


# --- Every field matters ---

SENSITIVE = [
    ("DINOv3", {"rope_theta": 50}), ("DINOv3", {"layer_norm_eps": 1e-2}), ("PE-Core", {"rope_grid_offset": 0}),
    ("PE-Core", {"rope_reference_grid": None}), ("PE-Core", {"pooler_num_heads": 3}),
    ("RoPE-ViT", {"rope_coordinates": "centered"}), ("TIPSv2", {"interpolate_mode": "bicubic"}),
    ("C-RADIO", {"interpolate_mode": "bilinear"}), ("CLIP", {"final_norm": "tokens"}),
    ("EVA-02 S", {"final_norm": "tokens"}), ("SigLIP", {"hidden_act": "gelu"}), ("CLIP", {"hidden_act": "gelu"}),
    ("DINOv3", {"rope_periods": [1.0, 3.0, 10.0, 32.0]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), SENSITIVE)
def test_another_value_of_a_field_fails_the_bar(name, changes):
    source, model = pair_of(name)
    config = RegViTConfig(**{"image_size": 32, **SHAPE, **GEOMETRIES[name].fields, **changes})
    other = RegViTModel(config).eval()
    other.load_state_dict(model.state_dict())
    pixels = normal(2, 3, 48, 24, seed=1)
    with torch.no_grad():
        expected, found = outputs_of(name, source, pixels), ours(other(pixels, output_hidden_states=True))
    errors = [(found[what] - tensor).abs().max() / tensor.std() for what, tensor in expected.items()]
    assert max(errors) > 5 * BAR


def test_a_key_bias_that_should_not_apply_has_no_effect():
    _, model = pair_of("DINOv3")
    pixels = normal(1, 3, 32, 32, seed=1)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        for layer in model.layers:
            layer.attention.qkv.bias[48:96] = 3.0
        assert torch.equal(model(pixels).last_hidden_state, before)
        layer.attention.qkv.bias[:48] += 3.0
        assert not torch.equal(model(pixels).last_hidden_state, before)

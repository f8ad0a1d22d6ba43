"""Test conversion against all golden files of official DINOv2, transformers and timm, and released manifests."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers import assert_golden, golden_files, load_golden, requires_shared, shared_dir, sizes_of, subtree
from hf_regvit import RegViTBackbone, RegViTConfig, RegViTForImageClassification, RegViTModel
from hf_regvit.models.conversion import convert
from hf_regvit.models.source_families import ConversionError

pytestmark = requires_shared

# Families outside the plain ViT with CLS: they have to be refused, see below.
TRANSFORMERS = {
    "dinov2", "dinov2_swiglu", "dinov2_with_registers", "dinov2_with_registers_swiglu", "dinov2_with_registers_cls",
    "dinov2_with_registers_backbone", "dinov2_with_registers_backbone_raw", "vit", "dinov3_vit", "dinov3_vit_gated",
    "clip_vision", "siglip_vision",
}  # fmt: skip
REFUSED = {"deit": "distillation_token"}


def dinov2_overrides(model: dict) -> dict:
    return {
        "num_attention_heads": model["num_heads"],
        "interpolate_antialias": model["interpolate_antialias"],
        "interpolate_offset": model["interpolate_offset"],
        "layer_norm_eps": 1e-6,
    }


WITH_FORWARD = [
    name
    for name in golden_files("dinov2")
    if not any(part in name for part in ("pos_embed_interp", "droppath", "grad"))
]


@pytest.mark.parametrize("name", WITH_FORWARD)
def test_official_dinov2(name: str) -> None:
    tensors, config = load_golden(name, double=True)
    model = convert(subtree(tensors, "sd."), **dinov2_overrides(config["model"])).double()
    assert isinstance(model, RegViTModel)
    assert not model.training
    for size in sizes_of(tensors):
        masks = tensors.get(f"in.masks.{size}")
        with torch.no_grad():
            output = model(
                tensors[f"in.pixels.{size}"],
                bool_masked_pos=None if masks is None else masks.bool(),
                output_hidden_states=True,
            )
        expected = subtree(tensors, f"out.{size}.")
        assert_golden(output.hidden_states[0], expected["tokens_in"])
        assert_golden(output.hidden_states[-1], expected["x_prenorm"])
        assert_golden(output.pooler_output, expected["x_norm_clstoken"])
        assert_golden(output.patch_tokens, expected["x_norm_patchtokens"])
        if "x_norm_regtokens" in expected:
            assert_golden(output.register_tokens, expected["x_norm_regtokens"])
        else:
            assert output.register_tokens.shape[1] == 0
        if "forward" in expected and masks is None:
            assert_golden(output.pooler_output, expected["forward"])
        if "pos_embed" in expected:
            rows, columns = (int(side) // model.config.patch_shape[0] for side in size.split("x"))
            assert_golden(model.embeddings.resample_positions((rows, columns)), expected["pos_embed"][:, 1:])
            assert_golden(model.embeddings.position_embeddings[:, :1], expected["pos_embed"][:, :1])


@pytest.mark.parametrize("name", WITH_FORWARD)
def test_official_intermediate_layers(name: str) -> None:
    """Rebuild `get_intermediate_layers` of the official code from `hidden_states`."""
    tensors, config = load_golden(name, double=True)
    model = convert(subtree(tensors, "sd."), **dinov2_overrides(config["model"])).double()
    depth = model.config.num_hidden_layers
    for i, call in enumerate(config["gil"]):
        kwargs = {"norm": True, "reshape": False, "return_class_token": False, **call["kwargs"]}
        with torch.no_grad():
            states = model(tensors[f"in.pixels.{call['size']}"], output_hidden_states=True).hidden_states
        blocks = kwargs["n"] if isinstance(kwargs["n"], list) else range(depth - kwargs["n"], depth)
        for j, block in enumerate(blocks):
            tokens = model.layernorm(states[block + 1]) if kwargs["norm"] else states[block + 1]
            cls_token, _, patches = model.split_tokens(tokens)
            if kwargs["reshape"]:
                rows, columns = (int(side) // model.config.patch_shape[0] for side in call["size"].split("x"))
                patches = patches.transpose(1, 2).unflatten(2, (rows, columns))
            assert_golden(patches, tensors[f"out.gil{i}.{j}.feat"])
            if kwargs["return_class_token"]:
                assert_golden(cls_token[:, 0], tensors[f"out.gil{i}.{j}.cls"])


@pytest.mark.parametrize("name", golden_files("cross"))
def test_same_weights_three_libraries(name: str) -> None:
    tensors, config = load_golden(name, double=True)
    overrides = dinov2_overrides(config["model"])
    official = convert(subtree(tensors, "dinov2.sd."), **overrides).double()
    # The two others resample as their own code does (golden/README.md, "Where the libraries disagree").
    registers = config["model"]["num_register_tokens"] > 0
    hf_rule = {"interpolate_antialias": registers, "interpolate_offset": 0.0}
    from_transformers = convert(subtree(tensors, "transformers.sd."), **{**overrides, **hf_rule}).double()
    timm_rule = {"interpolate_antialias": True, "interpolate_offset": 0.0}
    from_timm = convert(subtree(tensors, "timm.sd."), **{**overrides, **timm_rule}).double()
    for size in sizes_of(tensors):
        pixels = tensors[f"in.pixels.{size}"]
        with torch.no_grad():
            assert_golden(official(pixels).last_hidden_state, tensors[f"out.{size}.dinov2"])
            assert_golden(from_transformers(pixels).last_hidden_state, tensors[f"out.{size}.transformers"])
            assert_golden(from_timm(pixels).last_hidden_state, tensors[f"out.{size}.timm"])


@pytest.mark.parametrize("family", sorted(TRANSFORMERS))
@pytest.mark.parametrize("source", ["folder", "module"])
def test_transformers(family: str, source: str) -> None:
    folder = shared_dir() / "golden" / "transformers" / family
    tensors, config = load_golden(f"transformers/{family}/io.safetensors", double=True)
    if source == "folder":
        model = convert(folder)
    else:
        import transformers

        loaded = getattr(transformers, config["cls"].rsplit(".", 1)[-1]).from_pretrained(folder)
        model = convert(loaded)
    if family.endswith("_cls"):
        assert isinstance(model, RegViTForImageClassification)
    elif "backbone" in family:
        backbone = RegViTBackbone(model.config)
        backbone.regvit.load_state_dict(model.state_dict())
        model = backbone.eval()
    model.double().set_attn_implementation("eager")
    for call in config["calls"]:
        tag, compared = call["tag"], 0
        kwargs = {key: value for key, value in call.get("kwargs", {}).items() if key.startswith("output_")}
        if call.get("labels"):
            kwargs["labels"] = tensors[f"in.{tag}.labels"]
        if call.get("mask"):
            kwargs["bool_masked_pos"] = tensors[f"in.{tag}.bool_masked_pos"].bool()
        with torch.no_grad():
            output = model(tensors[f"in.{tag}.pixel_values"], **kwargs)
        for key, expected in subtree(tensors, f"out.{tag}.").items():
            field, _, index = key.partition(".")
            actual = output[field][int(index)] if index else output[field]
            assert_golden(actual.reshape(expected.shape), expected)
            compared += 1
        assert compared


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_transformers_families_it_cannot_express_are_refused_by_name(family: str, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        convert(shared_dir() / "golden" / "transformers" / family)


@pytest.mark.parametrize("name", golden_files("timm"))
@pytest.mark.parametrize("source", ["state_dict", "module"])
def test_timm(name: str, source: str) -> None:
    tensors, config = load_golden(name, double=True)
    state = subtree(tensors, "sd.")
    if source == "module":
        timm_vit = pytest.importorskip("timm.models.vision_transformer")
        kwargs = dict(config["model"])
        if kwargs.pop("swiglu", False):
            from timm.layers import SwiGLUPacked

            # A block hands its own activation to the gate, so the SiLU has to be named, as timm's presets do.
            kwargs |= {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
        module = timm_vit.VisionTransformer(**kwargs)
        module.load_state_dict(state)
        model = convert(module.eval())
    else:
        model = convert(state, num_attention_heads=config["model"]["num_heads"])
    assert isinstance(model.double(), RegViTForImageClassification)
    for size in sizes_of(tensors):
        with torch.no_grad():
            output = model.regvit(tensors[f"in.pixels.{size}"], output_hidden_states=True)
            logits = model(tensors[f"in.pixels.{size}"]).logits
            pooled = model.pool(output)
        expected = subtree(tensors, f"out.{size}.")
        assert_golden(output.last_hidden_state, expected["forward_features"])
        assert_golden(pooled, expected["pre_logits"])
        assert_golden(logits, expected["logits"])
        for i in (0, model.config.num_hidden_layers - 1):
            tokens = output.hidden_states[i + 1]
            if config["inter_norm"]:
                tokens = model.regvit.layernorm(tokens)
            cls_token, registers, patches = model.regvit.split_tokens(tokens)
            spatial = expected[f"intermediates.{i}.spatial"]
            assert_golden(patches.transpose(1, 2).reshape(spatial.shape), spatial)
            assert_golden(torch.cat([cls_token, registers], dim=1), expected[f"intermediates.{i}.prefix"])


MANIFESTS = [
    path.name
    for path in sorted((shared_dir() / "golden" / "manifests").glob("*.json") if shared_dir() else ())
    if path.name != "name_map_reg4.json"
]


@pytest.mark.parametrize("name", MANIFESTS)
def test_released_architectures(name: str) -> None:
    """Check that every parameter name and shape of the released checkpoints is used, without their weights."""
    manifest = json.loads((shared_dir() / "golden" / "manifests" / name).read_text())
    listed = manifest.get("parameters_on_disk") or manifest["parameters"]
    state = {key: torch.empty(shape, device="meta") for key, shape in listed.items()}
    width = next(shape[-1] for key, shape in listed.items() if key.endswith("cls_token"))
    heads = manifest["config"]["num_attention_heads"] if "config" in manifest else width // 64
    registers = "reg4" in name or "registers" in name
    model = convert(
        state,
        num_attention_heads=heads,
        interpolate_antialias=registers,
        interpolate_offset=0.0 if registers else 0.1,
        layer_norm_eps=1e-6,
    )
    assert model.config.num_register_tokens == (4 if registers else 0)
    assert model.config.image_size == 518
    assert model.config.patch_size == 14
    assert model.num_parameters() == sum(torch.Size(shape).numel() for shape in listed.values())
    preset = {384: "small", 768: "base", 1024: "large", 1536: "giant"}[width]
    wanted = RegViTConfig.from_preset(preset)
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "use_swiglu_ffn", "ffn_hidden_size"):
        assert getattr(model.config, field) == getattr(wanted, field)
    if "parameters_in_memory" in manifest:
        memory = {key: torch.empty(shape, device="meta") for key, shape in manifest["parameters_in_memory"].items()}
        again = convert(
            memory, num_attention_heads=heads, interpolate_antialias=True, interpolate_offset=0.0, layer_norm_eps=1e-6
        )
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }


def test_key_bias_is_in_its_place() -> None:
    """Compare the key bias as a parameter, because softmax cancels it in the outputs."""
    tensors, config = load_golden("dinov2/vit_reg4_mlp.safetensors")
    model = convert(subtree(tensors, "sd."), **dinov2_overrides(config["model"]))
    for i, layer in enumerate(model.layers):
        assert torch.equal(layer.attention.qkv.bias, tensors[f"sd.blocks.{i}.attn.qkv.bias"])
    folder = shared_dir() / "golden" / "transformers" / "dinov2_with_registers"
    on_disk = load_file(folder / "model.safetensors")
    for i, layer in enumerate(convert(folder).layers):
        pieces = [on_disk[f"encoder.layer.{i}.attention.attention.{n}.bias"] for n in ("query", "key", "value")]
        assert torch.equal(layer.attention.qkv.bias, torch.cat(pieces))


@pytest.mark.parametrize("name", WITH_FORWARD[:3])
def test_training_checkpoint(name: str) -> None:
    tensors, config = load_golden(name)
    state = subtree(tensors, "sd.")
    head = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight_g": torch.zeros(2, 1)}
    teacher = {f"backbone.{key}": value for key, value in state.items()} | head
    student = {f"backbone.{key}": value + 1 for key, value in state.items()} | head
    overrides = dinov2_overrides(config["model"])
    plain = convert(state, **overrides).state_dict()
    nested = convert({"teacher": teacher, "student": student, "iteration": 3}, **overrides).state_dict()
    flat = convert(
        {"model": {f"teacher.{k}": v for k, v in teacher.items()} | {f"student.{k}": v for k, v in student.items()}},
        **overrides,
    ).state_dict()
    assert plain.keys() == nested.keys() == flat.keys()
    assert all(torch.equal(plain[key], nested[key]) and torch.equal(plain[key], flat[key]) for key in plain)


def test_round_trip_through_save_pretrained(tmp_path) -> None:
    tensors, config = load_golden("dinov2/vit_swiglu_reg4.safetensors")
    model = convert(subtree(tensors, "sd."), **dinov2_overrides(config["model"]))
    model.save_pretrained(tmp_path)
    again = RegViTModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert again.config.to_dict().keys() == model.config.to_dict().keys()
    for size in sizes_of(tensors):
        with torch.no_grad():
            assert torch.equal(again(tensors[f"in.pixels.{size}"])[0], model(tensors[f"in.pixels.{size}"])[0])

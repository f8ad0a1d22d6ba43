"""Test the backbone: outputs, registers, initialization, padded batches, positions, precision and loading."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers.utils import logging as hf_logging

from builders import gradients_of, padded, pixels, randomized, spy, tiny_model
from hf_regvit import (
    RegViTBackbone,
    RegViTConfig,
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
)
from hf_regvit.models.modeling_regvit import RegViTEmbeddings

CLASSES = [
    RegViTModel,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTForDepthEstimation,
    RegViTBackbone,
]
TINY = {"image_size": 16, "num_labels": 5}


def build(cls: type = RegViTModel, *, seed: int = 0, **fields):
    """Create a model in eval mode without parameters near 0, so that ignoring any of them changes the output."""
    return randomized(tiny_model(cls, **TINY | fields), seed=seed)


# --- Outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 1, 4])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 40)])
@torch.no_grad()
def test_outputs_are_what_the_decisions_say(registers, height, width):
    model = build(num_register_tokens=registers)
    output = model(pixels(3, height, width), output_hidden_states=True)
    patches = height * width // 64
    tokens = 1 + registers + patches
    assert list(output) == [
        "last_hidden_state", "pooler_output", "register_tokens", "patch_tokens", "output_mask", "patch_mask",
        "hidden_states",
    ]  # fmt: skip
    assert output.last_hidden_state.shape == (3, tokens, 32)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    assert torch.equal(output.register_tokens, output.last_hidden_state[:, 1 : 1 + registers])
    assert torch.equal(output.patch_tokens, output.last_hidden_state[:, 1 + registers :])
    assert output.register_tokens.shape == (3, registers, 32)
    assert output.output_mask.dtype == output.patch_mask.dtype == torch.bool
    assert output.output_mask.tolist() == [[True] + [False] * registers + [True] * patches] * 3
    assert output.patch_mask.tolist() == [[False] + [False] * registers + [True] * patches] * 3


@torch.no_grad()
def test_hidden_states_are_the_raw_stream():
    model = build(num_hidden_layers=3)
    pixel_values = pixels()
    output = model(pixel_values, output_hidden_states=True)
    assert len(output.hidden_states) == 3 + 1
    stream = model.embeddings(pixel_values)
    assert torch.equal(output.hidden_states[0], stream)
    for layer, recorded in zip(model.layers, output.hidden_states[1:], strict=True):
        stream = layer(stream)[0]
        assert torch.equal(recorded, stream)
    assert torch.equal(output.last_hidden_state, model.layernorm(stream))
    assert not torch.equal(output.last_hidden_state, stream)  # the last entry is before the norm


@torch.no_grad()
def test_final_norm_pooled_leaves_the_sequence_raw():
    model = build(final_norm="pooled")
    output = model(pixels(), output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    expected = model.layernorm(output.hidden_states[-1][:, 5:].mean(1))
    torch.testing.assert_close(output.pooler_output, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_pooler_act_is_a_dense_layer_on_the_normed_cls():
    model = build(pooler_act="tanh")
    output = model(pixels())
    dense = model.pooler.dense
    expected = torch.tanh(functional.linear(output.last_hidden_state[:, 0], dense.weight, dense.bias))
    assert torch.equal(output.pooler_output, expected)


@torch.no_grad()
def test_tuple_has_the_same_order():
    model = build(attn_implementation="eager")
    model.set_attn_implementation("eager")
    pixel_values = pixels()
    output = model(pixel_values, output_hidden_states=True, output_attentions=True)
    as_tuple = model(pixel_values, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert len(as_tuple) == len(output) == 8
    for ours, named in zip(as_tuple, output.values(), strict=True):
        for a, b in zip(ours, named, strict=True):
            assert torch.equal(a, b)
    model.config.return_dict = False
    assert isinstance(model(pixel_values), tuple)


@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_discard_registers(registers, tmp_path):
    build(num_register_tokens=registers).save_pretrained(tmp_path)
    kept = RegViTModel.from_pretrained(tmp_path)(pixels(), output_hidden_states=True)
    model = RegViTModel.from_pretrained(tmp_path, discard_registers=True)
    output = model(pixels(), output_hidden_states=True)
    expected = torch.cat([kept.last_hidden_state[:, :1], kept.last_hidden_state[:, 1 + registers :]], dim=1)
    assert torch.equal(output.last_hidden_state, expected)
    assert output.output_mask.tolist() == [[True] * 5] * 2
    assert output.patch_mask.tolist() == [[False] + [True] * 4] * 2
    for name in ("pooler_output", "register_tokens", "patch_tokens"):
        assert torch.equal(output[name], kept[name])
    for ours, theirs in zip(output.hidden_states, kept.hidden_states, strict=True):
        assert torch.equal(ours, theirs)  # the residual stream always contains every token


@torch.no_grad()
def test_eight_at_once_equal_eight_alone():
    model, pixel_values = build(), pixels(8, 16, 24)
    together = model(pixel_values).last_hidden_state
    alone = torch.cat([model(image[None]).last_hidden_state for image in pixel_values])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attentions_are_the_softmax_of_the_book():
    model = build(num_register_tokens=2)
    pixel_values = pixels(1)
    by_sdpa = model(pixel_values)
    model.set_attn_implementation("eager")
    output = model(pixel_values, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, by_sdpa.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert [tuple(maps.shape) for maps in output.attentions] == [(1, 2, 7, 7)] * 2
    for layer, stream, maps in zip(model.layers, output.hidden_states, output.attentions, strict=False):
        qkv = layer.attention.qkv(layer.norm1(stream))[0]  # (T, 96): query, key, value, each head after head
        for head in range(2):
            for i in range(7):
                query = qkv[i, 16 * head : 16 * (head + 1)]
                scores = [
                    sum(float(a * b) for a, b in zip(query, qkv[j, 32 + 16 * head : 48 + 16 * head], strict=True)) / 4
                    for j in range(7)
                ]
                total = sum(math.exp(score - max(scores)) for score in scores)
                expected = [math.exp(score - max(scores)) / total for score in scores]
                assert maps[0, head, i].tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_attentions_under_sdpa_are_empty_and_said_to_be(caplog):
    hf_logging.warning_once.cache_clear()  # another test of this process may have triggered the warning
    output = build()(pixels(), output_attentions=True)
    assert not output.attentions
    assert any("set_attn_implementation('eager')" in record.getMessage() for record in caplog.records)


# --- Registers -------------------------------------------------------------------------------------------------------


def change_registers_after_the_last_block(model, count: int) -> None:
    def hook(module, args, output):
        tokens = output[0].clone()
        tokens[:, 1 : 1 + count] = 1e3 * torch.randn(tokens[:, 1 : 1 + count].shape)
        return (tokens, *output[1:])

    getattr(model, "regvit", model).layers[-1].register_forward_hook(hook)


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_registers_reach_no_head_and_no_pooled_output(cls):
    for fields in (
        {},
        {"pooling": "cls"},
        {"pooling": "mean_patch"},
        {"head_layers": [0, -1]},
        {"reshape_hidden_states": False},
    ):
        model = build(cls, **fields)
        before = model(pixels())
        change_registers_after_the_last_block(model, 4)
        after = model(pixels())
        compared = 0
        for name in ("pooler_output", "patch_tokens", "logits", "predicted_depth", "feature_maps"):
            value = before.get(name)
            if value is not None:
                pairs = zip(value, after[name], strict=True)
                assert all(torch.equal(a, b) for a, b in pairs), (fields, name)
                compared += 1
        assert compared


@torch.no_grad()
def test_registers_take_part_in_the_blocks():
    model = build()
    before = model(pixels()).pooler_output
    model.embeddings.register_tokens.mul_(2)
    assert (model(pixels()).pooler_output - before).abs().max() > 1e-3


@torch.no_grad()
def test_permuting_registers_leaves_cls_and_patches():
    model, order = build(), [2, 0, 3, 1]
    before = model(pixels())
    model.embeddings.register_tokens.copy_(model.embeddings.register_tokens[:, order])
    after = model(pixels())
    torch.testing.assert_close(after.pooler_output, before.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.patch_tokens, before.patch_tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.register_tokens, before.register_tokens[:, order], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_registers_enter_without_a_position():
    model = build()
    for pixel_values in (pixels(), pixels(2, 24, 8)):
        tokens = model.embeddings(pixel_values)
        assert torch.equal(tokens[:, 1:5], model.embeddings.register_tokens.expand(2, -1, -1))


def plain_vit(state: dict[str, torch.Tensor], config: RegViTConfig, pixel_values: torch.Tensor) -> torch.Tensor:
    """Compute a plain vision transformer without registers directly from the tensors."""
    patches = functional.conv2d(
        pixel_values,
        state["embeddings.patch_embeddings.projection.weight"],
        state["embeddings.patch_embeddings.projection.bias"],
        stride=8,
    )
    tokens = torch.cat([state["embeddings.cls_token"].expand(len(patches), 1, -1), patches.flatten(2).mT], dim=1)
    tokens = tokens + state["embeddings.position_embeddings"]

    def norm(tokens: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(tokens, (32,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(tokens: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(tokens, state[f"{name}.weight"], state[f"{name}.bias"])

    for i in range(config.num_hidden_layers):
        qkv = linear(norm(tokens, f"layers.{i}.norm1"), f"layers.{i}.attention.qkv").chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in qkv)
        branch = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        branch = linear(branch, f"layers.{i}.attention.o_proj")
        tokens = tokens + branch * state.get(f"layers.{i}.layer_scale1.lambda1", 1.0)
        branch = linear(norm(tokens, f"layers.{i}.norm2"), f"layers.{i}.mlp.fc1")
        branch = linear(functional.gelu(branch), f"layers.{i}.mlp.fc2")
        tokens = tokens + branch * state.get(f"layers.{i}.layer_scale2.lambda1", 1.0)
    return norm(tokens, "layernorm")


@torch.no_grad()
def test_without_registers_it_is_a_plain_vit_bit_for_bit():
    model = build(num_register_tokens=0, layerscale_value=None)
    assert not [name for name in model.state_dict() if "register" in name]
    pixel_values = pixels(4)
    expected = plain_vit(model.state_dict(), model.config, pixel_values)
    assert torch.equal(model(pixel_values).last_hidden_state, expected)


@torch.no_grad()
def test_without_registers_but_with_layerscale_it_is_a_plain_vit():
    """Compare with a small tolerance, because gain and sum are one fused operation in the model."""
    model = build(num_register_tokens=0)
    pixel_values = pixels(4)
    expected = plain_vit(model.state_dict(), model.config, pixel_values)
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_swiglu_gates_with_the_first_half():
    model = build(use_swiglu_ffn=True)
    mlp, tokens = model.layers[0].mlp, torch.randn(2, 3, 32)
    weight, bias = mlp.gate_up_proj.weight, mlp.gate_up_proj.bias
    width = len(weight) // 2
    gate = functional.linear(tokens, weight[:width], bias[:width])
    up = functional.linear(tokens, weight[width:], bias[width:])
    expected = mlp.down_proj(gate * torch.sigmoid(gate) * up)
    torch.testing.assert_close(mlp(tokens), expected, atol=1e-5, rtol=1e-5)


def test_resize_keeps_the_old_registers_and_draws_new_ones():
    model = build(num_register_tokens=3)
    old = model.embeddings.register_tokens.detach().clone()
    assert model.resize_register_tokens(5) is model
    new = model.embeddings.register_tokens
    assert isinstance(new, torch.nn.Parameter)
    assert new.requires_grad
    assert torch.equal(new[:, :3], old)
    drawn = new[0, 3:]
    assert not torch.equal(drawn[0], drawn[1])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.4)  # tolerance: of a sample
    assert model.config.num_register_tokens == 5
    assert model(pixels()).register_tokens.shape == (2, 5, 32)
    again = build(num_register_tokens=3).resize_register_tokens(5).embeddings.register_tokens
    assert torch.equal(again, new)  # the same seed
    other = build(num_register_tokens=3).resize_register_tokens(5, seed=1).embeddings.register_tokens
    assert not torch.equal(other, new)


@torch.no_grad()
def test_resize_downwards_from_nothing_and_to_nothing(tmp_path):
    model = build(num_register_tokens=3)
    first = model.embeddings.register_tokens[:, :1].clone()
    assert torch.equal(model.resize_register_tokens(1).embeddings.register_tokens, first)
    model.resize_register_tokens(0)
    expected = build(num_register_tokens=0)
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model(pixels()).last_hidden_state, expected(pixels()).last_hidden_state)
    model.resize_register_tokens(2)
    assert model(pixels()).register_tokens.shape == (2, 2, 32)
    model.save_pretrained(tmp_path)
    loaded = RegViTModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels()).last_hidden_state, model(pixels()).last_hidden_state)


@torch.no_grad()
def test_two_models_of_one_config_object():
    """Regression test: with a shared config, resizing the student shifted where the teacher's patches start."""
    student = build()
    teacher = RegViTModel(student.config).eval()
    student.resize_register_tokens(student.config.num_register_tokens + 2)
    student(pixels())
    with pytest.raises(ValueError, match=r"has 4 registers, but its config says num_register_tokens=6.*deepcopy"):
        teacher(pixels())
    plain = build(num_register_tokens=0)
    plain.config.num_register_tokens = 1
    with pytest.raises(ValueError, match="has 0 registers, but its config says num_register_tokens=1"):
        plain(pixels())


@torch.no_grad()
def test_resize_inside_a_classifier():
    model = build(RegViTForImageClassification)
    model.regvit.resize_register_tokens(6)
    assert model.config.num_register_tokens == 6
    assert model(pixels()).logits.shape == (2, 5)


@torch.no_grad()
@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_resizes_its_registers(cls):
    """Regression test: only the backbone had the method, but `convert` may return a classifier."""
    model = build(cls, num_register_tokens=2)
    before = model(pixels(), return_dict=False)
    assert model.resize_register_tokens(5, seed=3) is model
    assert model.config.num_register_tokens == 5
    expected = build(RegViTModel, num_register_tokens=2).resize_register_tokens(5, seed=3).embeddings.register_tokens
    assert torch.equal(model.base_model.embeddings.register_tokens[:, 2:], expected[:, 2:])
    torch.testing.assert_close(model.resize_register_tokens(2)(pixels(), return_dict=False), before, rtol=0, atol=0)


# --- Initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_initialisation_reaches_every_tensor(cls):
    with torch.device("meta"):
        model = tiny_model(cls, **TINY, use_mask_token=True, pooler_act="tanh").train()
    model.to_empty(device="cpu")
    floats = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    floats = {name: tensor for name, tensor in floats.items() if tensor.is_floating_point()}
    for tensor in floats.values():
        tensor.data.fill_(torch.nan)
    model.init_weights()
    assert [name for name, tensor in floats.items() if tensor.isnan().any()] == []


def test_initialisation_has_the_statistics_of_dinov2():
    """Compare with the initialization of DINOv2, except for the registers, which are N(0, 0.02)."""
    model = tiny_model(
        hidden_size=256, num_attention_heads=4, num_register_tokens=64, use_mask_token=True, layerscale_value=1e-5,
        image_size=64, num_hidden_layers=1,
    )  # fmt: skip
    state = model.state_dict()
    std = {name: tensor.std().item() for name, tensor in state.items() if tensor.numel() > 1}
    for name in ("attention.qkv", "attention.o_proj", "mlp.fc1", "mlp.fc2"):
        assert std[f"layers.0.{name}.weight"] == pytest.approx(0.02, rel=0.05)
        assert not state[f"layers.0.{name}.bias"].any()
    assert std["embeddings.position_embeddings"] == pytest.approx(0.02, rel=0.05)
    assert std["embeddings.register_tokens"] == pytest.approx(0.02, rel=0.05)
    assert std["embeddings.cls_token"] == pytest.approx(1e-6, rel=0.2)  # tolerance: of a sample of 256
    assert not state["embeddings.mask_token"].any()
    bound = 1 / math.sqrt(3 * 8 * 8)  # default of torch for convolutions: uniform
    for name in ("weight", "bias"):
        tensor = state[f"embeddings.patch_embeddings.projection.{name}"]
        assert 0.95 * bound < tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    for name in ("layers.0.norm1", "layers.0.norm2", "layernorm"):
        assert (state[f"{name}.weight"] == 1).all()
        assert not state[f"{name}.bias"].any()
    for name in ("layer_scale1", "layer_scale2"):
        assert torch.equal(state[f"layers.0.{name}.lambda1"], torch.full((256,), 1e-5))


def test_layerscale_value_is_a_field():
    for value in (0.3, 1e-5):
        gains = [p for name, p in tiny_model(layerscale_value=value).named_parameters() if name.endswith("lambda1")]
        assert len(gains) == 4
        assert all(torch.equal(gain, torch.full_like(gain, value)) for gain in gains)


def test_register_init_std_is_a_field():
    assert tiny_model(num_register_tokens=64, register_init_std=1e-6).embeddings.register_tokens.std() < 2e-6
    assert tiny_model(num_register_tokens=64, register_init_std=1.0).embeddings.register_tokens.std() > 0.9


def test_f47_registers_differ_after_initialisation_and_stay_different():
    model = tiny_model(**TINY, hidden_size=64, layerscale_value=1.0).train()

    # The expected distance of two draws is sqrt(2 * 64) * 0.02 = 0.23.
    assert torch.pdist(model.embeddings.register_tokens[0]).min() > 0.02
    before = model.embeddings.register_tokens.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        model(pixels(4, seed=step)).patch_tokens[..., 0].square().mean().backward()
        optimizer.step()
    assert not torch.equal(model.embeddings.register_tokens, before)
    gradient = model.embeddings.register_tokens.grad[0]
    assert torch.pdist(gradient).min() > 0  # identical registers would always get identical gradients
    assert torch.pdist(model.embeddings.register_tokens[0]).min() > 0.02


# --- Padded batches --------------------------------------------------------------------------------------------------

SIZES = [(16, 16), (8, 24), (24, 16), (8, 8), (32, 24)]


without_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT"),
    reason="torch 2.14 computes masks of flex attention wrongly without AVX-512, and the model refuses it",
)


@pytest.mark.parametrize(
    "attn_implementation", ["sdpa", "eager", pytest.param("flex_attention", marks=without_avx512)]
)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_register_tokens": 0},
        {"image_size": [24, 16], "interpolate_offset": 0.1, "interpolate_antialias": False},
        {"patch_size": [8, 4]},
    ],
)
@torch.no_grad()
def test_every_image_of_a_padded_batch_equals_itself_alone(attn_implementation, fields):
    model = build(**fields)
    model.set_attn_implementation(attn_implementation)
    pixel_values, pixel_mask = padded(*SIZES)
    prefix = model.config.num_prefix_tokens
    # Eager: compiling flex attention takes minutes; the compiled kernel has its own, slow test.
    with torch.compiler.set_stance("force_eager"):
        output = model(pixel_values, pixel_mask=pixel_mask, output_hidden_states=True)
        for i, (height, width) in enumerate(SIZES):
            alone = model(pixel_values[i : i + 1, :, :height, :width], output_hidden_states=True)
            real = output.patch_mask[i]
            assert real.sum() == height * width // math.prod(model.config.patch_shape)
            found = torch.cat([output.last_hidden_state[i, :prefix], output.last_hidden_state[i, real]])
            torch.testing.assert_close(found, alone.last_hidden_state[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(output.pooler_output[i], alone.pooler_output[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(output.register_tokens[i], alone.register_tokens[0], atol=1e-5, rtol=1e-5)
            for ours, theirs in zip(output.hidden_states, alone.hidden_states, strict=True):
                found = torch.cat([ours[i, :prefix], ours[i, real]])
                torch.testing.assert_close(found, theirs[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masks_of_a_padded_batch_are_false_at_padding():
    model = build(num_register_tokens=2)
    pixel_values, pixel_mask = padded((16, 8), (8, 24))  # a grid of 2 x 3 patches
    output = model(pixel_values, pixel_mask=pixel_mask)
    patches = [[True, False, False, True, False, False], [True, True, True, False, False, False]]
    assert output.patch_mask.tolist() == [[False] * 3 + row for row in patches]
    assert output.output_mask.tolist() == [[True, False, False] + row for row in patches]
    model.config.discard_registers = True
    output = model(pixel_values, pixel_mask=pixel_mask)
    assert output.patch_mask.tolist() == [[False] + row for row in patches]
    assert output.output_mask.tolist() == [[True] + row for row in patches]
    assert output.last_hidden_state.shape == (2, 7, 32)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.long, torch.float32])
@torch.no_grad()
def test_padding_and_the_type_of_the_mask_do_not_matter(dtype):
    model = build()
    pixel_values, pixel_mask = padded(*SIZES)
    expected = model(pixel_values, pixel_mask=pixel_mask)
    blank = pixel_values * pixel_mask[:, None]
    output = model(blank, pixel_mask=pixel_mask.to(dtype))
    assert torch.equal(output.pooler_output, expected.pooler_output)
    keep = expected.output_mask
    assert torch.equal(output.last_hidden_state[keep], expected.last_hidden_state[keep])


@torch.no_grad()
def test_a_mask_of_ones_changes_nothing():
    model, pixel_values = build(), pixels(2, 24, 16)
    output = model(pixel_values, pixel_mask=torch.ones(2, 24, 16))
    torch.testing.assert_close(output.last_hidden_state, model(pixel_values).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert output.output_mask.sum() == 2 * (1 + 6)


def test_gradients_of_a_padded_batch_equal_those_of_its_images():
    model = build()
    pixel_values, pixel_mask = padded(*SIZES)
    output = model(pixel_values, pixel_mask=pixel_mask)
    output.last_hidden_state[output.patch_mask].square().sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for i, (height, width) in enumerate(SIZES):
        model(pixel_values[i : i + 1, :, :height, :width]).patch_tokens.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


@torch.no_grad()
def test_masked_patches_in_a_padded_batch():
    model = build(use_mask_token=True)
    pixel_values, pixel_mask = padded((16, 8), (16, 16))
    masked = torch.tensor([[True, False, False, True], [False, True, True, False]])
    output = model(pixel_values, bool_masked_pos=masked, pixel_mask=pixel_mask)
    alone = model(pixel_values[:1, :, :, :8], bool_masked_pos=torch.tensor([[True, False]]))
    torch.testing.assert_close(output.patch_tokens[0, [0, 2]], alone.patch_tokens[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_flex_attention_of_a_padded_batch_is_refused_where_torch_computes_it_wrongly(monkeypatch, capability):
    model = build()
    model.set_attn_implementation("flex_attention")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    pixel_values, pixel_mask = padded(*SIZES)
    with pytest.raises(ValueError, match=r"flex_attention.*set_attn_implementation\('sdpa'\)"):
        model(pixel_values, pixel_mask=pixel_mask)


@without_avx512
@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_attention_in_a_padded_batch():
    model = build()
    pixel_values, pixel_mask = padded((16, 16), (8, 16))
    expected = model(pixel_values, pixel_mask=pixel_mask)
    model.set_attn_implementation("flex_attention")
    output = model(pixel_values, pixel_mask=pixel_mask)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)


# --- Masked patches --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_masked_patches_are_replaced_before_positions_are_added():
    model = build(use_mask_token=True)
    masked = torch.tensor([[True, False, False, True], [False, False, True, False]])
    tokens = model.embeddings(pixels(), masked)
    plain = model.embeddings(pixels())
    positions = model.embeddings.position_embeddings[0, 1:]
    for i in range(2):
        assert torch.equal(tokens[i, :5], plain[i, :5])
        for j in range(4):
            expected = model.embeddings.mask_token[0] + positions[j] if masked[i, j] else plain[i, 5 + j]
            assert torch.equal(tokens[i, 5 + j], expected)


@torch.no_grad()
def test_what_lies_under_a_mask_does_not_matter():
    model = build(use_mask_token=True)
    masked = torch.tensor([[True, False, False, False]])
    first, second = pixels(1), pixels(1)
    second[:, :, :8, :8] = 100.0
    assert torch.equal(
        model(first, bool_masked_pos=masked).last_hidden_state, model(second, bool_masked_pos=masked).last_hidden_state
    )
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert torch.equal(model(first, bool_masked_pos=nothing).last_hidden_state, model(first).last_hidden_state)


def test_a_mask_needs_a_mask_token_and_the_shape_of_the_patches():
    with pytest.raises(ValueError, match="use_mask_token=True"):
        build()(pixels(), bool_masked_pos=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(2, 8\).*\(2, 4\)"):
        build(use_mask_token=True)(pixels(), bool_masked_pos=torch.zeros(2, 8, dtype=torch.bool))


# --- Positions -------------------------------------------------------------------------------------------------------


def resampled(model, grid: tuple[int, int]) -> torch.Tensor:
    """Return the positions (N, D) of a grid, read from the embedding with black images."""
    patch = model.config.patch_shape
    with torch.no_grad():
        model.embeddings.patch_embeddings.projection.bias.zero_()
        tokens = model.embeddings(torch.zeros(1, 3, grid[0] * patch[0], grid[1] * patch[1]))
    return tokens[0, model.config.num_prefix_tokens :]


def test_rows_and_columns_are_not_swapped():
    model = build(image_size=[24, 32])  # 3 rows, 4 columns
    with torch.no_grad():
        table = torch.zeros(3, 4, 32)
        table[..., 0] = torch.arange(3.0)[:, None]
        table[..., 1] = torch.arange(4.0)
        model.embeddings.position_embeddings[0, 1:] = table.flatten(0, 1)
    assert torch.equal(resampled(model, (3, 4)), table.flatten(0, 1))  # the stored grid, unchanged
    for grid in ((4, 3), (6, 8), (2, 5)):
        found = resampled(model, grid).view(*grid, 32)
        torch.testing.assert_close(found[:, :1, 0].expand(grid), found[..., 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[:1, :, 1].expand(grid), found[..., 1], atol=1e-5, rtol=0)
        assert (found[..., 0].diff(dim=0) > 0).all()
        assert (found[..., 1].diff(dim=1) > 0).all()


@torch.no_grad()
def test_rectangular_patches():
    model = build(image_size=(16, 16), patch_size=(8, 4))
    output = model(pixels(2, 24, 12))
    assert output.patch_tokens.shape == (2, 9, 32)
    assert model.config.grid == (2, 4)


def other_grids(resample) -> list[tuple[int, int]]:
    """Grids of the calls of `resample_positions` that differ from the grid of the model."""
    return [call.args[1] for call in resample.call_args_list if call.args[1] != call.args[0].config.grid]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_one_resample_per_grid_outside_training(context, monkeypatch):
    model, resample = build(), spy(monkeypatch, RegViTEmbeddings, "resample_positions")
    with context():
        for height, width in [(16, 16), (24, 32), (24, 32), (32, 24), (24, 32), (32, 24), (16, 16)]:
            model(pixels(2, height, width))
        assert other_grids(resample) == [(3, 4), (4, 3)]
        model(padded(*SIZES)[0])
        model(padded(*SIZES)[0], pixel_mask=padded(*SIZES)[1])
    assert len(other_grids(resample)) == len(set(other_grids(resample)))


def test_a_frozen_table_is_cached_even_where_gradients_are_on(monkeypatch):
    model, resample = build(), spy(monkeypatch, RegViTEmbeddings, "resample_positions")
    model.embeddings.position_embeddings.requires_grad_(False)
    for _ in range(3):
        model(pixels(1, 24, 32)).pooler_output.sum().backward()
    assert other_grids(resample) == [(3, 4)]


def test_every_training_step_resamples(monkeypatch):
    model, resample = build().train(), spy(monkeypatch, RegViTEmbeddings, "resample_positions")
    for _ in range(3):
        model(pixels(1, 24, 32))
    assert len(other_grids(resample)) == 3


def test_gradients_reach_the_table_at_another_size_in_eval_mode():
    model = build()
    with torch.no_grad():
        model(pixels(1, 24, 32))  # fills the cache
    model(pixels(1, 24, 32)).patch_tokens.square().sum().backward()
    gradient = model.embeddings.position_embeddings.grad
    assert (gradient[0, 1:].abs().amax(1) > 0).all()


def test_the_cache_forgets_the_oldest_grid_and_stays_small():
    model = build()
    with torch.no_grad():
        for rows in range(1, 14):
            model(pixels(1, 8 * rows, 8))
    assert len(model.embeddings._cached_positions) == model.embeddings.MAX_CACHED_GRIDS


def change_table(model, how: str) -> None:
    """Change the stored positions in one of the ways in which parameters change."""
    table = model.embeddings.position_embeddings
    match how:
        case "in_place":
            with torch.no_grad():
                table.mul_(-1)
        case "through_data":
            table.data.mul_(-1)
        case "new_data":
            table.data = -table.data
        case "optimizer_step":
            table.grad = torch.ones_like(table)
            torch.optim.SGD([table], lr=1.0).step()
        case "load_state":
            model.load_state_dict(build(seed=9).state_dict())
        case "new_parameter":
            model.embeddings.position_embeddings = torch.nn.Parameter(-table.detach())
        case "to_half_and_back":
            model.to(torch.bfloat16).to(torch.float32)
        case "in_inference_mode":
            with torch.inference_mode():
                table.data.mul_(-1)


@pytest.mark.parametrize(
    "how",
    [
        "in_place", "through_data", "new_data", "optimizer_step", "load_state", "new_parameter", "to_half_and_back",
        "in_inference_mode",
    ],
)  # fmt: skip
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_cache_notices_every_change_of_the_table(how, context):
    model, pixel_values = build(), pixels(1, 24, 32)
    with context():
        before = model(pixel_values).last_hidden_state
    change_table(model, how)
    with context():
        after = model(pixel_values).last_hidden_state
    clean = build()
    clean.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = clean(pixel_values).last_hidden_state
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


@torch.no_grad()
def test_positions_cached_in_half_precision_do_not_serve_the_same_numbers_in_single():
    model, pixel_values = build().to(torch.bfloat16), pixels(1, 24, 32)
    model(pixel_values)  # caches positions that were rounded to bfloat16
    model.to(torch.float32)
    clean = build()
    clean.load_state_dict(model.state_dict())
    positions, expected = (one.embeddings.patch_positions((3, 4)) for one in (model, clean))
    assert positions.dtype == torch.float32
    assert torch.equal(positions, expected)
    assert not torch.equal(expected, expected.bfloat16().float())


def test_every_parameter_gets_a_gradient_where_nothing_is_masked():
    # Otherwise data parallelism waits for the mask token's gradient or searches for unused parameters in every step.
    model = build(use_mask_token=True, num_register_tokens=2).train()
    model(pixels()).last_hidden_state.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert not model.embeddings.mask_token.grad.any()


@torch.no_grad()
def test_a_copy_has_a_cache_of_its_own():
    model = build()
    model(pixels(1, 24, 32))
    teacher = copy.deepcopy(model)
    teacher.embeddings.position_embeddings.mul_(0.5)
    assert not torch.equal(teacher(pixels(1, 24, 32)).pooler_output, model(pixels(1, 24, 32)).pooler_output)
    assert not [name for name in model.state_dict() if "cache" in name]


@torch.no_grad()
def test_copies_for_other_devices_share_no_cache():
    """Check replicas of `nn.DataParallel`, which share attributes but have tables on different devices."""
    model, pixel_values = build(), pixels(1, 24, 32)
    model(pixel_values)
    kept = dict(model.embeddings._cached_positions)
    replica = model.embeddings._replicate_for_data_parallel()
    replica.position_embeddings = (-model.embeddings.position_embeddings).detach()
    positions = replica.patch_positions((3, 4))
    assert torch.equal(positions, -kept[3, 4])
    assert torch.equal(model.embeddings._cached_positions[3, 4], kept[3, 4])


@torch.no_grad()
def test_an_ensemble_of_torch_func_at_another_size():
    """Check `vmap`, under which the position table has no values to compare with the cached ones."""
    models, pixel_values = [build(seed=seed) for seed in range(2)], pixels(1, 24, 32)
    parameters, buffers = torch.func.stack_module_state(models)

    def pooled(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (pixel_values,)).pooler_output

    found = torch.func.vmap(pooled)(parameters, buffers)
    expected = torch.stack([model(pixel_values).pooler_output for model in models])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_positions_filled_in_inference_mode_serve_a_later_backward():
    model, pixel_values = build(), pixels(1, 24, 32)
    model.embeddings.position_embeddings.requires_grad_(False)
    with torch.inference_mode():
        model(pixel_values)
    model(pixel_values).pooler_output.sum().backward()
    assert model.embeddings.cls_token.grad.abs().sum() > 0


# --- Training and compilation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("with_padding", [False, True])
def test_checkpointed_gradients_equal_the_plain_ones(reentrant, with_padding):
    model = build().train()
    pixel_values, pixel_mask = padded(*SIZES)

    mask = pixel_mask if with_padding else None
    plain = gradients_of(model(pixel_values, pixel_mask=mask).patch_tokens.square().sum(), model)
    forwards = []
    model.layers[0].norm1.register_forward_hook(lambda *_: forwards.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients_of(model(pixel_values, pixel_mask=mask).patch_tokens.square().sum(), model)
    for name, gradient in found.items():
        assert torch.equal(gradient, plain[name]), name
    assert len(forwards) == 2  # once in the forward and once in the backward pass: checkpointing was on


@pytest.mark.parametrize("cls", [CLASSES[0], *(pytest.param(cls, marks=pytest.mark.slow) for cls in CLASSES[1:])])
@torch.no_grad()
def test_compiles_into_one_graph(cls):
    model, pixel_values = build(cls, num_hidden_layers=1), pixels(2, 24, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(pixel_values).values(), model(pixel_values).values(), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_compiled_training_step_equals_the_plain_one():
    model = build(use_mask_token=True, num_hidden_layers=1).train()
    masked = torch.tensor([[True, False, False, True]] * 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(pixels(), bool_masked_pos=masked).patch_tokens.square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_with_inductor():
    model = build()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for size in ((16, 16), (24, 32)):
        expected = model(pixels(2, *size)).last_hidden_state
        torch.testing.assert_close(compiled(pixels(2, *size)).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@torch.no_grad()
def test_half_precision_is_close_to_single(dtype, error):
    model = build()
    for pixel_values in (pixels(), pixels(2, 24, 40)):
        expected = model(pixel_values)
        half = copy.deepcopy(model).to(dtype)
        output = half(pixel_values)  # float32 pixels are cast, because every processor returns float32
        assert output.last_hidden_state.dtype == output.pooler_output.dtype == dtype
        distance = (output.last_hidden_state.float() - expected.last_hidden_state).norm()
        assert distance / expected.last_hidden_state.norm() < error


@torch.no_grad()
def test_half_precision_in_a_padded_batch():
    model = build().to(torch.bfloat16)
    pixel_values, pixel_mask = padded(*SIZES)
    for attn_implementation in ("sdpa", "eager"):
        model.set_attn_implementation(attn_implementation)
        output = model(pixel_values, pixel_mask=pixel_mask)
        expected = build()(pixel_values, pixel_mask=pixel_mask).pooler_output
        assert (output.pooler_output.float() - expected).norm() / expected.norm() < 0.02


# --- Saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_one_set_of_names_in_memory_and_on_disk(cls, tmp_path):
    model = build(cls, use_mask_token=True)
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    in_memory = model.state_dict()
    assert set(on_disk) == set(in_memory)
    loaded = cls.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, in_memory[name]), name
        assert torch.equal(tensor, on_disk[name]), name
    prefix = "" if cls is RegViTModel else "regvit."
    for name in ("embeddings.register_tokens", "layers.1.attention.qkv.weight", "layers.0.layer_scale2.lambda1"):
        assert prefix + name in on_disk


def test_parameter_names_are_those_of_the_decisions():
    expected = {
        "embeddings.cls_token", "embeddings.register_tokens", "embeddings.mask_token",
        "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.bias", "layernorm.weight", "layernorm.bias",
    }  # fmt: skip
    block = ["norm1", "attention.qkv", "attention.o_proj", "norm2"]
    for ffn, swiglu in ((["mlp.fc1", "mlp.fc2"], False), (["mlp.gate_up_proj", "mlp.down_proj"], True)):
        names = {f"layers.0.{name}.{kind}" for name in block + ffn for kind in ("weight", "bias")}
        names |= {"layers.0.layer_scale1.lambda1", "layers.0.layer_scale2.lambda1"}
        model = build(num_hidden_layers=1, use_mask_token=True, use_swiglu_ffn=swiglu)
        assert set(model.state_dict()) == expected | names
    assert "embeddings.mask_token" not in build().state_dict()


@pytest.mark.parametrize("cls", CLASSES)
def test_loading_builds_on_meta_and_leaves_nothing_there(cls, tmp_path, monkeypatch):
    build(cls).save_pretrained(tmp_path)
    devices, original = [], RegViTEmbeddings.__init__

    def remember(self, config):
        original(self, config)
        devices.append(self.cls_token.device.type)

    monkeypatch.setattr(RegViTEmbeddings, "__init__", remember)
    model = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert devices == ["meta"]
    assert [name for name, tensor in model.state_dict().items() if tensor.is_meta] == []
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    model(pixels(2, 24, 16))


@torch.no_grad()
def test_a_classifier_gives_its_backbone_and_takes_one(tmp_path):
    classifier = build(RegViTForImageClassification)
    classifier.save_pretrained(tmp_path / "classifier")
    backbone, info = RegViTModel.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(backbone(pixels()).pooler_output, classifier.regvit(pixels()).pooler_output)
    backbone.save_pretrained(tmp_path / "backbone")
    model, info = RegViTForImageClassification.from_pretrained(
        tmp_path / "backbone", num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(model.regvit(pixels()).pooler_output, backbone(pixels()).pooler_output)


def test_a_checkpoint_without_mask_token_serves_a_model_with_one_and_back(tmp_path):
    build().save_pretrained(tmp_path / "without")
    model = RegViTModel.from_pretrained(tmp_path / "without", use_mask_token=True)
    assert not model.embeddings.mask_token.any()  # its initial value
    build(use_mask_token=True).save_pretrained(tmp_path / "with")
    model = RegViTModel.from_pretrained(tmp_path / "with", use_mask_token=False)
    assert model.embeddings.mask_token is None


@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_weights_may_be_offloaded_to_the_disk(cls, tmp_path):
    """Check that every module with its own parameters is called, because accelerate hooks load them only then."""
    model = build(cls, layerscale_value=0.1)
    expected = model(pixels(2, 24, 32)).to_tuple()
    model.save_pretrained(tmp_path / "model")
    loaded = cls.from_pretrained(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
    for ours, theirs in zip(loaded.eval()(pixels(2, 24, 32)).to_tuple(), expected, strict=True):
        assert torch.equal(
            ours[0] if isinstance(ours, tuple) else ours, theirs[0] if isinstance(theirs, tuple) else theirs
        )


def test_a_state_dict_in_hand_may_be_partial():
    model = build()
    state = {name: tensor for name, tensor in model.state_dict().items() if "register" not in name}
    loaded = RegViTModel.from_pretrained(None, config=model.config, state_dict=state)
    assert loaded.embeddings.register_tokens.std().item() == pytest.approx(0.02, rel=0.5)
    assert torch.equal(loaded.embeddings.cls_token, model.embeddings.cls_token)

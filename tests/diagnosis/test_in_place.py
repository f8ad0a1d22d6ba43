"""Test-time registers inside models of other families: equal to the retrofit of a RegViT, and undone bit for bit."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
import transformers
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipModel,
)

from builders import tiny_model, tiny_source
from hf_regvit import ConversionError, RetrofitError, add_test_time_registers, convert, diagnose, repair_in_place
from hf_regvit.diagnosis.controls import register_controls
from hf_regvit.diagnosis.register_neurons import find_register_neurons
from hf_regvit.models.tokens import TokenReader
from planted_defects import MODELS, PROCESSOR, QUIET, SIZES, plant_neuron, plant_sink, sample

NEURONS = [[2, 37], [0, 5], [2, 9], [5, 100]]
OTHERS = [family for family in MODELS if family != "regvit"]


def eva(**fields):
    """An Eva of timm that a RegViT cannot express, because a gate follows its attention."""
    torch.manual_seed(0)
    sizes = {"img_size": 96, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 0}
    return timm.models.eva.Eva(**sizes, use_rot_pos_emb=True, dynamic_img_size=True, **fields).eval()


def read_patches(model, pixels):
    reading = TokenReader(model).read(pixels, layers=(0, 3, 6))
    return torch.cat([reading.patches(layer) for layer in reading.layers], dim=1)


@pytest.mark.parametrize("family", OTHERS)
def test_a_repair_in_place_equals_the_retrofit(family):
    model, pixels = MODELS[family](), sample(4, seed=0).pixels
    expected = add_test_time_registers(convert(copy.deepcopy(model)), NEURONS, num_register_tokens=3)
    state, plain = copy.deepcopy(model.state_dict()), model(pixels)
    shapes = plain.shape if torch.is_tensor(plain) else plain.last_hidden_state.shape
    repair = repair_in_place(model, NEURONS, num_register_tokens=3)
    ours, theirs = (TokenReader(each).read(pixels, layers=(0, 3, 6)) for each in (model, expected))
    assert ours.num_register_tokens == theirs.num_register_tokens
    for layer in ours.layers:
        torch.testing.assert_close(ours.at(layer), theirs.at(layer), atol=1e-5, rtol=1e-5)
    after = model(pixels)
    assert (after.shape if torch.is_tensor(after) else after.last_hidden_state.shape) == shapes
    assert type(model) is type(MODELS[family]())
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    repair.undo()
    again = model(pixels)
    assert torch.equal(*(x if torch.is_tensor(x) else x.last_hidden_state for x in (again, plain)))
    assert [type(part) for part in model.modules()] == [type(part) for part in MODELS[family]().modules()]


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_a_planted_neuron_is_repaired_in_place(family):
    seen = sample(64, seed=0)
    model = MODELS[family]()
    plant_neuron(model, seen)
    before = read_patches(model, seen.pixels)
    repair_in_place(model, find_register_neurons(model, seen.images, processor=PROCESSOR).best(1))
    report = diagnose(model, seen.images, **QUIET)
    assert not report.bimodal
    assert report.model["num_register_tokens"] == 1
    assert "registers" in report.sinks["sets"]
    normal = torch.from_numpy(~np.tile(seen.cells[0], 3))
    cosine = torch.cosine_similarity(read_patches(model, seen.pixels), before, dim=-1)[normal].mean()
    assert cosine >= (0.998 if family == "siglip" else 0.999)


@pytest.mark.parametrize("name", ["DeiTModel", "Aimv2VisionModel"])
def test_families_of_transformers_that_a_regvit_cannot_express(name):
    model, seen = tiny_source(name, **SIZES), sample(64, seed=0)
    with pytest.raises(ConversionError):
        convert(model)
    plain = model(seen.pixels[:4]).last_hidden_state
    direction = plant_neuron(model, seen) if name == "DeiTModel" else None
    before = TokenReader(model).read(seen.pixels[:4], layers=(3,)).patches().norm(dim=-1)
    repair = repair_in_place(model, NEURONS)
    assert model(seen.pixels[:4]).last_hidden_state.shape == plain.shape
    after = TokenReader(model).read(seen.pixels[:4], layers=(3,))
    if direction is not None:
        assert after.patches().norm(dim=-1).max() < 0.3 * before.max() < after.registers().norm(dim=-1).min()
    repair.undo()
    assert direction is not None or torch.equal(model(seen.pixels[:4]).last_hidden_state, plain)


@pytest.mark.parametrize("kind", ["gated", "rotary", "mixed"])
def test_models_that_a_regvit_cannot_express(kind):
    fields = {
        "gated": {"attn_type": "rope", "use_post_norm": True},
        "rotary": {"swiglu_mlp": True, "scale_mlp": True, "attn_type": "rope", "num_reg_tokens": 2},
        "mixed": {"attn_type": "rope", "rope_type": "mixed"},
    }[kind]
    model, pixels = eva(**fields), sample(4, seed=0).pixels
    plain, reading = model.forward_features(pixels), TokenReader(model).read(pixels, layers=(6,))
    repair = repair_in_place(model, NEURONS, num_register_tokens=2)
    made = model.forward_features(pixels)
    assert made.shape == plain.shape
    after = TokenReader(model).read(pixels, layers=(6,))
    assert after.num_register_tokens == reading.num_register_tokens + 2
    assert not torch.allclose(made, plain, atol=1e-4)
    repair.undo()
    assert torch.equal(model.forward_features(pixels), plain)


def two_towers(cls):
    """A CLIP or SigLIP model with the vision tower of the planted family."""
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 64, "projection_dim": 16, "max_position_embeddings": 8, "eos_token_id": 2}
    if cls is SiglipModel:
        text["projection_size"] = SIZES["hidden_size"]
    return cls(cls.config_class(text_config=text, vision_config=SIZES, projection_dim=16)).eval()


@pytest.mark.parametrize("cls", [CLIPModel, SiglipModel])
def test_two_tower_models_give_the_features_of_the_repaired_tower(cls, tmp_path):
    model, seen = two_towers(cls), sample(8, seed=0)
    words = torch.tensor([[3, 4, 2]])
    text = model.get_text_features(input_ids=words).pooler_output
    repair = repair_in_place(model, NEURONS, num_register_tokens=2)
    tower = add_test_time_registers(convert(two_towers(cls)), NEURONS, num_register_tokens=2)
    image = model.vision_model(seen.pixels).pooler_output
    torch.testing.assert_close(
        image, tower(seen.pixels, output_hidden_states=True).pooler_output, atol=1e-5, rtol=1e-5
    )
    assert torch.equal(model.get_text_features(input_ids=words).pooler_output, text)
    model.save_pretrained(tmp_path)
    repair.save(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert torch.equal(loaded.vision_model(seen.pixels).pooler_output, two_towers(cls).vision_model(seen.pixels)[1])
    assert json.loads((tmp_path / "test_time_registers.json").read_text())["neurons"] == NEURONS
    repair_in_place(loaded, tmp_path)
    assert torch.equal(loaded.vision_model(seen.pixels).pooler_output, image)


def test_a_llava_reads_the_hidden_states_of_the_repaired_tower():
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SIZES)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=9)).eval()
    pixels = sample(2, seed=0).pixels
    ids = torch.tensor([[1] + [9] * 144 + [2, 3]] * 2)
    plain = model(input_ids=ids, pixel_values=pixels).logits
    tower = model.model.vision_tower
    states = tower(pixels, output_hidden_states=True).hidden_states  # installs the hooks of transformers first
    repair = repair_in_place(model, NEURONS, num_register_tokens=2)
    made = model(input_ids=ids, pixel_values=pixels).logits
    assert made.shape == plain.shape
    assert not torch.allclose(made, plain, atol=1e-4)
    after = tower(pixels, output_hidden_states=True).hidden_states
    assert [state.shape for state in after] == [state.shape for state in states]
    patches = TokenReader(model).read(pixels, layers=(5,)).patches()
    torch.testing.assert_close(after[-2][:, 1:], patches, atol=1e-6, rtol=0)
    repair.undo()
    assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, plain)


@pytest.mark.slow
def test_copies_gradients_and_compiled_models():
    model, pixels = MODELS["dinov2"](), sample(2, seed=0).pixels
    repair = repair_in_place(model, NEURONS)
    expected = model(pixels).last_hidden_state
    assert torch.equal(copy.deepcopy(model)(pixels).last_hidden_state, expected)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    grads = []
    for each in (model, checkpointed):
        each.train()
        each(pixels).last_hidden_state.square().sum().backward()
        grads.append(each.embeddings.cls_token.grad)
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)
    model.eval()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(pixels).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert repr(repair) == "<InPlaceRepair: 4 neurons, 1 registers, in place>"


def test_controls_replace_registers_in_place_as_those_of_a_regvit():
    model, seen = MODELS["dinov2"](), sample(64, seed=0)
    direction = plant_neuron(model, seen, ratio=20.0)
    plant_sink(model, direction, blocks=(3, 4), head=1, parks=False)
    pixels = seen.pixels[:8]
    expected = register_controls(add_test_time_registers(convert(copy.deepcopy(model)), NEURONS), pixels)
    repair_in_place(model, NEURONS)
    found = register_controls(model, pixels)
    for kind in ("mean", "shuffle", "noise", "zero"):
        assert found[kind]["patch_cosine"] == pytest.approx(expected[kind]["patch_cosine"], abs=1e-4)
    assert found["zero"]["patch_cosine"] < 0.9999


@pytest.mark.parametrize(
    ("version", "prefix"), [("vit_large_patch16_radio_v3", 8), ("vit_so400m_patch16_radio_v4", 10)]
)
def test_radio_of_timm_is_repaired_in_place(version, prefix):
    torch.manual_seed(0)
    sizes = {"img_size": 96, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 0}
    model, seen = timm.create_model(version, mlp_ratio=2, **sizes).eval(), sample(64, seed=0)
    plant_neuron(model, seen)
    assert TokenReader(model).description.num_prefix_tokens == prefix
    before = TokenReader(model).read(seen.pixels, layers=(3,)).patches().norm(dim=-1)
    found = find_register_neurons(model, seen.images, processor=PROCESSOR)
    assert found.best(1) == [[2, 37]]
    repair_in_place(model, found.best(1))
    after = TokenReader(model).read(seen.pixels, layers=(3,))
    assert after.num_register_tokens == prefix
    assert (before > found.cutoff).sum() == seen.cells[0].sum()
    assert not (after.patches().norm(dim=-1) > found.cutoff).any()


def test_families_that_cannot_be_read_say_why():
    for name, reason in (("Radio", "can be read from timm's"), ("Beit", "a bias to its attention")):
        kind = getattr(transformers, f"{name}Model")
        model = kind(kind.config_class(**SIZES, **({"max_img_size": 96} if name == "Radio" else {})))
        with pytest.raises(ValueError, match=f"'{name.lower()}' is not in the family table.*{reason}"):
            repair_in_place(model, NEURONS)


def test_what_cannot_be_repaired_in_place_says_why():
    model = MODELS["clip"]()
    with pytest.raises(RetrofitError, match=r"no neuron \[2, 192\].*6 blocks, and block 2 has 192 neurons"):
        repair_in_place(model, [[2, 192]])
    with pytest.raises(RetrofitError, match=r"no neuron \[6, 0\]"):
        repair_in_place(model, [[6, 0]])
    with pytest.raises(RetrofitError, match="need both"):
        repair_in_place(model, [])
    with pytest.raises(RetrofitError, match=r"is a RegViT\. Use add_test_time_registers"):
        repair_in_place(tiny_model(), NEURONS)
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    with pytest.raises(ValueError, match=r"not in the family table.*windows"):
        repair_in_place(swin, NEURONS)
    parallel = timm.create_model(
        "vit_base_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock, img_size=96,
        patch_size=8, embed_dim=96, depth=6, num_heads=3, num_classes=0,
    )  # fmt: skip
    with pytest.raises(RetrofitError, match="ParallelScalingBlock, has no MLP with one ordinary last layer"):
        repair_in_place(parallel, NEURONS)
    repair_in_place(model, NEURONS)
    with pytest.raises(RetrofitError, match="already repaired in place"):
        repair_in_place(model, NEURONS)
    with pytest.raises(ConversionError, match="test-time registers in place"):
        convert(model)


class FixedBias(torch.nn.Module):
    """Attention with a table of positions for a fixed number of tokens, as in BEiT."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.table = inner, torch.nn.Parameter(torch.zeros(145, 96))

    def forward(self, x, **kwargs):
        return self.inner(x + self.table, **kwargs)


def test_attention_for_a_fixed_number_of_tokens_is_refused_and_left_as_it_was():
    model, pixels = MODELS["timm"](), sample(2, seed=0).pixels
    model.blocks[3].attn = FixedBias(model.blocks[3].attn)
    expected = model(pixels)
    with pytest.raises(RetrofitError, match=r"timm model does not take more tokens.*145"):
        repair_in_place(model, NEURONS)
    assert torch.equal(model(pixels), expected)


def test_tokens_that_change_between_blocks_are_refused():
    model = MODELS["timm"]()
    model.blocks[2].register_forward_hook(lambda module, args, output: output * 1.0)
    with pytest.raises(RetrofitError, match="between two blocks"):
        repair_in_place(model, NEURONS)

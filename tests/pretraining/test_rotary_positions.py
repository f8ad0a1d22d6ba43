"""Pretraining with rotary positions, as in DINOv3: from arguments, from a converted model, in every phase of a run."""

import math

import pytest
import torch
from safetensors.torch import load_file

from builders import tiny_model
from hf_regvit import RegViTModel, pretrain
from hf_regvit.pretraining.crops import DinoCollator
from hf_regvit.pretraining.distillation import SelfDistillation
from hf_regvit.pretraining.run import _build_network
from hf_regvit.pretraining.starting_point import starting_point
from tiny_run import GRID, PATCH, Crops, arguments, same_state, tiny_batch, tiny_config, tiny_network, trained

pytestmark = pytest.mark.usefixtures("without_figures")

ROTARY = {"use_position_embeddings": False, "rope_theta": 100, "key_bias": False}
AUGMENTED = {**ROTARY, "pos_embed_rescale": 2.0}


def test_arguments_describe_a_rotary_backbone(tmp_path):
    config = arguments(tmp_path, position="rotary", pos_embed_rescale=2.0).backbone_config()
    assert (config.use_position_embeddings, config.rope_theta, config.key_bias) == (False, 100.0, False)
    assert config.pos_embed_rescale == 2.0
    network = _build_network(arguments(tmp_path, position="rotary", gram_loss_weight=1.0), None)
    assert not any("position_embeddings" in name for name in network.state_dict())
    learned = arguments(tmp_path).backbone_config()
    assert (learned.rope_theta, learned.use_position_embeddings, learned.key_bias) == (None, True, True)
    assert learned.to_dict() == arguments(tmp_path, position="learned").backbone_config().to_dict()


def test_contradicting_arguments_name_the_option(tmp_path):
    with pytest.raises(ValueError, match=r"position is 'absolute'.*'learned' or 'rotary'"):
        arguments(tmp_path, position="absolute")
    with pytest.raises(ValueError, match=r"pos_embed_rescale is 2\.0.*--position rotary"):
        arguments(tmp_path, pos_embed_rescale=2.0)


def test_tokens_of_the_losses_equal_those_of_the_model():
    backbone = tiny_model(**{**tiny_config(**ROTARY).to_diff_dict(), "layerscale_value": 1.0})
    pixels = torch.randn(3, 3, GRID * PATCH, GRID * PATCH)
    patches = torch.tensor([0, 5, 17, 47])
    with torch.no_grad():
        cls, rows = SelfDistillation._tokens(backbone, pixels, patches)
        output = backbone(pixels)
    torch.testing.assert_close(cls, output.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows, output.patch_tokens.flatten(0, 1)[patches], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_run_with_all_phases(tmp_path):
    """Local crops, larger crops at the end, Gram anchoring and augmented coordinates."""
    larger = 6 * PATCH
    pretrain(
        arguments(
            tmp_path, position="rotary", pos_embed_rescale=2.0, gram_loss_weight=1.0, gram_refresh_steps=2,
            drop_path_rate=0.3,
        ),
        train_dataset=Crops(),
    )  # fmt: skip
    model = RegViTModel.from_pretrained(tmp_path / "backbone")
    assert (model.config.rope_theta, model.config.pos_embed_rescale) == (100.0, 2.0)
    for layer in model.layers:
        query, key, value = layer.attention.qkv.bias.chunk(3)
        assert not key.any()
        assert query.any()
        assert value.any()
    high_resolution = (Crops(global_size=larger), DinoCollator((6, 6), mask_probability=1.0, seed=7))
    trainer = trained(
        tmp_path / "larger", config=tiny_config(**AUGMENTED), high_resolution=high_resolution,
        high_resolution_steps=3.0,
    )  # fmt: skip
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """The coordinates are drawn from the generator that checkpoints store."""
    config = {"config": tiny_config(**AUGMENTED), "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "a", **config)
    resumed = trained(tmp_path / "b", **config, resume=str(tmp_path / "a" / "checkpoint-3"))
    assert same_state(whole.model.state_dict(), resumed.model.state_dict())


def test_only_the_student_sees_scaled_coordinates():
    network, batch = tiny_network(config=tiny_config(**AUGMENTED)).train(), tiny_batch()
    losses = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        losses.append(network(**batch)["loss"].item())
    assert losses[0] == losses[2] != losses[1]
    logits = [network._teacher_outputs(batch["global_crops"], batch["mask_indices"])[0] for _ in range(2)]
    assert torch.equal(*logits)


def test_starting_from_a_rotary_model(tmp_path):
    source = tiny_model(**{**tiny_config(**ROTARY, num_register_tokens=0).to_diff_dict(), "attention_pooler": True})
    source.save_pretrained(tmp_path / "source")
    start = starting_point(tmp_path / "source", num_register_tokens=2, image_size=24, pos_embed_rescale=2.0)
    assert start.changes[0] == "It has no registers; 2 new ones are added (--num_register_tokens)."
    assert not any("positions" in change for change in start.changes)
    config = start.student.config
    assert (config.rope_theta, config.pos_embed_rescale, config.image_size) == (100, 2.0, 24)
    assert start.student.pooler is None
    saved = load_file(tmp_path / "source" / "model.safetensors")
    state = start.student.state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in state if name in saved)
    pretrain(arguments(tmp_path / "run", init_from=str(tmp_path / "source"), max_steps=1), train_dataset=Crops())


def test_positions_of_another_kind_are_refused_with_the_remedy(tmp_path):
    tiny_model(**tiny_config().to_diff_dict()).save_pretrained(tmp_path / "learned")
    tiny_model(**tiny_config(**ROTARY).to_diff_dict()).save_pretrained(tmp_path / "rotary")
    sizes = {"num_register_tokens": 4, "image_size": 16}
    with pytest.raises(ValueError, match=r"has learned positions.*position=rotary.*without --init_from"):
        starting_point(tmp_path / "learned", position="rotary", **sizes)
    with pytest.raises(ValueError, match=r"has learned positions.*pos_embed_rescale=2\.0"):
        starting_point(tmp_path / "learned", pos_embed_rescale=2.0, **sizes)
    with pytest.raises(ValueError, match=r"has rotary positions.*position=learned"):
        starting_point(tmp_path / "rotary", position="learned", **sizes)


def test_a_clip_tower_normalizes_all_tokens_for_the_losses(tmp_path):
    clip = {"embedding_norm": True, "final_norm": "cls", "projection_dim": 5}
    tiny_model(**{**tiny_config().to_diff_dict(), **clip}).save_pretrained(tmp_path)
    student = starting_point(tmp_path, num_register_tokens=4, image_size=16).student
    assert (student.config.final_norm, student.config.projection_dim, student.projection) == ("tokens", None, None)

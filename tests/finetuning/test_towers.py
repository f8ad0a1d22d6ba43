"""Fine-tuning of towers with rotary positions, without CLS and with poolers of their own."""

import pytest

from helpers import slow_except
from hf_regvit import RegViTForImageClassification, RegViTModel
from tiny_finetune import backbone, run

TOWERS = {
    "rotary": {"use_position_embeddings": False, "rope_theta": 100, "key_bias": False, "pos_embed_rescale": 2.0},
    "no CLS": {"use_cls_token": False},
    "pooled": {"use_cls_token": False, "attention_pooler": True},
    "CLIP": {"embedding_norm": True, "final_norm": "cls", "projection_dim": 6},
}


@pytest.mark.parametrize("tower", slow_except(TOWERS, "CLIP"))
def test_a_tower_is_finetuned_and_opened_as_a_backbone(tower, tmp_path):
    fields = TOWERS[tower]
    run(tmp_path, model=backbone(**fields), num_train_epochs=1)
    (saved,) = {path.parent for path in tmp_path.rglob("model.safetensors") if "checkpoint" not in str(path)}
    model = RegViTForImageClassification.from_pretrained(saved)
    assert model.config.pooling == ("mean_patch" if tower == "no CLS" else "cls_mean_patch")
    assert (model.regvit.pooler is not None) == ("attention_pooler" in fields)
    RegViTModel.from_pretrained(saved)


def test_a_pooling_that_needs_cls_names_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"pooling='cls'.*use_cls_token=False.*pooling='mean_patch'"):
        run(tmp_path, model=backbone(**TOWERS["no CLS"]), pooling="cls")

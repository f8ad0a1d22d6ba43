"""Test RegViTConfig: errors name every invalid value, and valid values survive saving and loading."""

import json
import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from helpers import requires_shared, shared_dir
from hf_regvit import ConfigError, RegViTConfig, RegViTModel, __version__
from hf_regvit.models.configuration_regvit import AUTO_MAP, PRESETS

TINY = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

# Every field differs from its default, including rectangular sizes.
EVERYTHING = {
    "num_register_tokens": 2, "image_size": (16, 24), "patch_size": (8, 4), "num_channels": 5, "hidden_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 3.5, "intermediate_size": 40, "hidden_act": "relu",
    "use_swiglu_ffn": True, "qkv_bias": False, "proj_bias": False, "mlp_bias": False, "layer_norm_eps": 1e-12,
    "layerscale_value": None, "initializer_range": 0.03, "register_init_std": 0.5, "drop_path_rate": 0.25,
    "drop_path_mode": "batch_subset", "drop_path_uniform": False, "use_mask_token": True, "no_embed_class": True,
    "interpolate_antialias": False, "interpolate_offset": 0.1, "pooler_act": "tanh", "discard_registers": True,
    "register_neurons": [[0, 5], [1, 0]],
    "num_test_time_registers": 1,
    "register_sizes": [224, 320],
    "pooling": "cls", "head_layers": [0, -1], "semantic_loss_ignore_index": 0, "num_depth_bins": 64,
    "min_depth": 0.5, "max_depth": 80.0, "apply_layernorm": False, "reshape_hidden_states": False,
    "return_register_tokens": True,
}  # fmt: skip
# The fields that cannot be set together with all of the above.
ROTARY = {
    **TINY, "use_cls_token": False, "use_position_embeddings": False, "rope_theta": 50.5, "rope_coordinates": "index",
    "rope_periods": [1.5, 2.5, 3, 4], "rope_grid_offset": 1.0, "rope_reference_grid": [4, 6], "key_bias": False,
    "attention_norm": True, "mlp_norm": True, "embedding_norm": True, "attention_pooler": True, "pooler_num_heads": 4,
    "pooler_intermediate_size": 24, "projection_dim": 7,
}  # fmt: skip
AUGMENTED = {
    **TINY, "rope_theta": 100, "pos_embed_shift": 0.1, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0,
    "interpolate_mode": "radio", "final_norm": "none",
}  # fmt: skip


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- Wrong values ----------------------------------------------------------------------------------------------------

# field, invalid value, valid value that the message must suggest
OUT_OF_RANGE = [
    ("hidden_size", 0, 768), ("hidden_size", -32, 768), ("hidden_size", 100_000, 768),
    ("num_hidden_layers", 0, 12), ("num_hidden_layers", -2, 12), ("num_attention_heads", 0, 12),
    ("num_register_tokens", -1, 4), ("num_register_tokens", 5000, 4), ("num_channels", 0, 3),
    ("intermediate_size", 0, None), ("intermediate_size", -8, None), ("num_depth_bins", 1, 256),
    ("mlp_ratio", 0, 4), ("mlp_ratio", float("nan"), 4), ("layer_norm_eps", -1e-6, 1e-6),
    ("layerscale_value", 0, 1e-5), ("layerscale_value", float("inf"), 1e-5), ("initializer_range", -0.02, 0.02),
    ("register_init_std", 0, 0.02), ("drop_path_rate", 1.0, 0.0), ("drop_path_rate", -0.1, 0.0),
    ("interpolate_offset", 1.0, 0.0), ("min_depth", -1.0, 0.001), ("max_depth", float("inf"), 10.0),
    ("patch_size", 0, 16), ("patch_size", (8, -8), 16), ("image_size", 0, 224), ("image_size", -16, 224),
    ("rope_theta", 0, None), ("rope_theta", float("nan"), None), ("rope_grid_offset", float("inf"), 0.0),
    ("pos_embed_shift", -0.1, None), ("pos_embed_jitter", 0.5, None), ("pos_embed_rescale", 0.9, None),
    ("pooler_num_heads", 0, None), ("pooler_intermediate_size", 0, None), ("projection_dim", 0, None),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "valid"), OUT_OF_RANGE)
def test_number_out_of_range_names_field_value_and_a_valid_one(field, value, valid):
    with pytest.raises(ConfigError) as error:
        RegViTConfig(**{**TINY, field: value})
    assert f"{field}={value}" in str(error.value)
    assert f"e.g. {valid}" in str(error.value)
    RegViTConfig(**{field: valid})  # the advice works


@pytest.mark.parametrize(
    ("field", "value", "valid"),
    [
        ("drop_path_mode", "batch", "batch_subset"),
        ("pooling", "registers", "cls_mean_patch"),
        ("pooling", "", "cls"),
        ("final_norm", "all", "tokens"),
        ("pooler_act", "softmax", "tanh"),
        ("hidden_act", "swish2", "gelu"),
        ("interpolate_mode", "nearest", "bicubic"),
        ("rope_coordinates", "pixels", "centered"),
    ],
)
def test_unknown_choice_names_field_value_and_the_choices(field, value, valid):
    with pytest.raises(ConfigError) as error:
        RegViTConfig(**{**TINY, field: value})
    assert f"{field}={value!r}" in str(error.value)
    assert f"'{valid}'" in str(error.value)
    RegViTConfig(**{**TINY, field: valid})


@pytest.mark.parametrize(
    ("wrong", "fragments", "right"),
    [
        (
            {"num_attention_heads": 5},
            ("num_attention_heads=5", "hidden_size=32", "Use num_attention_heads=4"),
            {"num_attention_heads": 4},
        ),
        ({"image_size": 20}, ("image_size=20", "patch_size=8", "16 or 24"), {"image_size": 24}),
        ({"image_size": 4}, ("image_size=4", "patch_size=8", "Use 8"), {"image_size": 8}),
        ({"image_size": (16, 20)}, ("image_size=(16, 20)", "patch_size=8", "24"), {"image_size": (16, 24)}),
        ({"image_size": [16]}, ("image_size=[16]", "pair", "224"), {"image_size": [16, 16]}),
        ({"patch_size": [8, 8, 8]}, ("patch_size=[8, 8, 8]", "pair"), {"patch_size": (8, 8)}),
        ({"head_layers": [2]}, ("head_layers=[2]", "[-2, 1]", "[-1]"), {"head_layers": [-1]}),
        ({"head_layers": [-3]}, ("head_layers=[-3]", "[-1]"), {"head_layers": [-2]}),
        ({"head_layers": []}, ("head_layers=[]", "[-1]"), {"head_layers": [-1]}),
        ({"min_depth": 10.0}, ("min_depth=10.0", "max_depth=10.0", "0.001"), {"min_depth": 0.001}),
        ({"mlp_ratio": 0.01}, ("mlp_ratio=0.01", "hidden_size=32", "Use mlp_ratio=4"), {"mlp_ratio": 4}),
        ({"num_labels": 0}, ("num_labels=0", "e.g. 2"), {"num_labels": 2}),
        ({"id2label": {}}, ("id2label", "[]", "numbered from 0"), {"id2label": {"0": "cat", "1": "dog"}}),
        ({"id2label": {1: "a", 2: "b"}}, ("[1, 2]", "numbered from 0"), {"id2label": {1: "a", 0: "b"}}),
        ({"num_labels": -3}, ("num_labels=-3", "e.g. 2"), {"num_labels": 1}),
        (
            {"final_norm": "pooled", "pooler_act": "tanh"},
            ("pooler_act='tanh'", "final_norm='pooled'", "pooler_act=None"),
            {"final_norm": "pooled", "pooler_act": None},
        ),
        (
            {"hidden_size": 65536, "num_hidden_layers": 1000},
            ("hidden_size=65536", "num_hidden_layers=1000", "GiB", "hidden_size=1536"),
            {"hidden_size": 1536, "num_hidden_layers": 40},
        ),
    ],
)
def test_values_that_do_not_go_together(wrong, fragments, right):
    with pytest.raises(ConfigError) as error:
        RegViTConfig(**{**TINY, **wrong})
    for fragment in fragments:
        assert fragment in str(error.value)
    RegViTConfig(**{**TINY, **right})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", "768", "int"), ("hidden_size", 32.0, "int"), ("hidden_size", None, "int"),
        ("num_register_tokens", True, "int"), ("num_register_tokens", 4.0, "int"), ("image_size", "224", "int"),
        ("image_size", [16.0, 16], "list[int]"), ("patch_size", {"height": 8}, "int"), ("qkv_bias", 1, "bool"),
        ("layer_norm_eps", "1e-6", "float"), ("drop_path_rate", None, "float"), ("pooling", 3, "str"),
        ("head_layers", -1, "list[int]"), ("head_layers", [0.5], "list[int]"), ("use_mask_token", "yes", "bool"),
    ],
)  # fmt: skip
def test_wrong_type_names_field_value_and_the_right_type(field, value, expected):
    with pytest.raises(ConfigError) as error:
        RegViTConfig(**{**TINY, field: value})
    assert str(error.value).startswith(f"{field}={value!r} has the wrong type")
    assert expected in str(error.value)
    valid = RegViTConfig.__dataclass_fields__[field].default
    assert f"e.g. {valid!r}." in str(error.value)


def test_wrong_type_is_refused_after_construction_too():
    config = RegViTConfig(**TINY)
    with pytest.raises(StrictDataclassError, match=r"hidden_size='large' has the wrong type.*768"):
        config.hidden_size = "large"


def test_value_made_wrong_after_construction_is_neither_saved_nor_built(tmp_path):
    config = RegViTConfig(**TINY)
    config.num_attention_heads = 5
    with pytest.raises(StrictDataclassError, match="num_attention_heads=5"):
        config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="num_attention_heads=5"):
        RegViTModel(config)


CONTRADICTIONS = [
    ({"use_position_embeddings": False}, "rope_theta=None", {"rope_theta": 100}),
    ({"interpolate_mode": "radio", "interpolate_offset": 0.1}, "interpolate_offset=0.1", {"interpolate_offset": 0.0}),
    ({"rope_periods": [1.0] * 4}, "rope_theta=None", {"rope_theta": 100}),
    ({"rope_coordinates": "index"}, "rope_theta=None", {"rope_theta": 100}),
    ({"pos_embed_rescale": 2.0}, "rope_theta=None", {"rope_theta": 100}),
    ({"rope_theta": 100, "rope_grid_offset": 1}, "rope_coordinates='centered'", {"rope_coordinates": "index"}),
    ({"rope_theta": 100, "rope_reference_grid": [2, 2]}, "rope_coordinates='centered'", {"rope_coordinates": "index"}),
    (
        {"rope_theta": 100, "rope_coordinates": "index", "pos_embed_shift": 1},
        "rope_coordinates='index'",
        {"rope_coordinates": "centered"},
    ),
    (
        {"rope_theta": 9, "use_position_embeddings": False, "no_embed_class": True},
        "use_position_embeddings=False",
        {"no_embed_class": False},
    ),
    (
        {"rope_theta": 9, "use_position_embeddings": False, "interpolate_offset": 0.1},
        "use_position_embeddings=False",
        {"interpolate_offset": 0.0},
    ),
    ({"rope_theta": 100, "hidden_size": 36}, "hidden_size=36", {"hidden_size": 40}),
    ({"rope_theta": 100, "rope_periods": [1.0] * 3}, "4 positive numbers", {"rope_periods": None}),
    ({"rope_theta": 100, "rope_periods": [1.0, 2, 3, 0]}, "4 positive numbers", {"rope_periods": None}),
    (
        {"rope_theta": 9, "rope_coordinates": "index", "rope_reference_grid": [2]},
        "[rows, columns]",
        {"rope_reference_grid": [2, 2]},
    ),
    ({"use_cls_token": False, "pooler_act": "tanh"}, "use_cls_token=False", {"pooler_act": None}),
    ({"use_cls_token": False, "final_norm": "cls"}, "use_cls_token=False", {"final_norm": "tokens"}),
    ({"final_norm": "pooled", "pooler_act": "tanh"}, "final_norm='pooled'", {"pooler_act": None}),
    ({"attention_pooler": True, "pooler_act": "tanh"}, "attention_pooler=True", {"pooler_act": None}),
    ({"final_norm": "cls", "attention_pooler": True}, "attention_pooler=True", {"final_norm": "tokens"}),
    ({"pooler_num_heads": 3, "attention_pooler": True}, "hidden_size=32", {"pooler_num_heads": 2}),
    ({"pooler_num_heads": 2}, "attention_pooler=False", {"attention_pooler": True}),
    ({"pooler_intermediate_size": 2}, "attention_pooler=False", {"attention_pooler": True}),
]


@pytest.mark.parametrize(("fields", "named", "remedy"), CONTRADICTIONS)
def test_fields_that_contradict_each_other_are_named_with_a_remedy_that_works(fields, named, remedy):
    with pytest.raises(ConfigError) as error:
        RegViTConfig(**{**TINY, **fields})
    message = str(error.value)
    wrong = next(name for name in reversed(fields) if f"{name}=" in message)
    assert f"{wrong}={fields[wrong]!r}" in message
    assert named in message
    if "hidden_size" not in remedy:
        ((name, better),) = remedy.items()
        assert f"{name}={better!r}" in message or name == "rope_reference_grid"
    RegViTConfig(**{**TINY, **fields, **remedy})


# --- Keywords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [("num_register_token", "num_register_tokens"), ("hiden_size", "hidden_size"), ("layerscale", "layerscale_value")],
)
def test_unknown_keyword_warns_with_the_nearest_field(keyword, nearest, caplog):
    config = RegViTConfig(**TINY, **{keyword: 7})
    (message,) = warnings_of(caplog)
    assert f"'{keyword}'" in message
    assert f"'{nearest}'" in message
    assert getattr(config, nearest) == getattr(RegViTConfig(**TINY), nearest)


def test_what_transformers_itself_hands_over_is_no_unknown_keyword(tmp_path, caplog):
    config = RegViTConfig(**TINY, num_labels=3, output_hidden_states=True, out_features=["stage1"], dtype="float16")
    config.save_pretrained(tmp_path)
    RegViTConfig.from_pretrained(tmp_path, attn_implementation="eager", num_labels=3)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("version", "warns"), [("9.0.0", True), ("0.1.1.dev0", True), (__version__, False), ("0.0.9", False)]
)
def test_config_of_a_newer_version_loads_with_a_warning(version, warns, tmp_path, caplog):
    RegViTConfig(**TINY).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "hf_regvit_version": version}))
    config = RegViTConfig.from_pretrained(tmp_path)
    messages = [message for message in warnings_of(caplog) if version in message and __version__ in message]
    assert bool(messages) == warns
    assert not warns or "pip install -U hf_regvit" in messages[0]
    assert config.to_dict()["hf_regvit_version"] == __version__  # saved by the current version


def test_a_version_that_is_none_does_not_stop_loading():
    assert RegViTConfig(**TINY, hf_regvit_version="unknown").hidden_size == 32


# --- To disk and back ------------------------------------------------------------------------------------------------


def test_the_round_trip_covers_every_field():
    fields = {name for name in RegViTConfig.__dataclass_fields__ if not name.startswith("_")}
    fields -= set(PreTrainedConfig.__dataclass_fields__)
    default = RegViTConfig()
    everything = ROTARY | AUGMENTED | EVERYTHING
    assert set(everything) == fields
    assert [name for name, value in everything.items() if getattr(default, name) == value] == []


@pytest.mark.parametrize(
    "fields",
    [{}, TINY, EVERYTHING, ROTARY, AUGMENTED, {**TINY, "final_norm": "pooled", "pooling": "mean_patch"}]
    + [PRESETS["giant"]],
)
def test_round_trip_keeps_every_field(fields, tmp_path):
    config = RegViTConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = RegViTConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        found = getattr(loaded, name)
        assert found == value or list(found) == list(value), name  # JSON turns tuples into lists
    assert json.loads(loaded.to_json_string()) == json.loads(config.to_json_string())
    assert loaded.grid == config.grid
    assert loaded.num_parameters() == config.num_parameters()


def test_saved_file_names_its_version_and_every_auto_class(tmp_path):
    RegViTConfig(**TINY, use_cache=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["hf_regvit_version"] == __version__
    assert saved["auto_map"] == AUTO_MAP
    assert saved["model_type"] == "regvit"
    assert "use_cache" not in saved
    assert type(AutoConfig.from_pretrained(tmp_path)) is RegViTConfig  # without trust_remote_code


def test_overrides_at_load(tmp_path):
    RegViTConfig(**TINY).save_pretrained(tmp_path)
    config = RegViTConfig.from_pretrained(tmp_path, drop_path_rate=0.3, discard_registers=True, num_hidden_layers=5)
    assert (config.drop_path_rate, config.discard_registers, config.hidden_size) == (0.3, True, 32)
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4", "stage5"]


def test_feature_maps_follow_the_depth(tmp_path):
    """Regression test: the checkpoint of a shortened model named a missing block and could not be loaded."""
    RegViTConfig(**TINY).save_pretrained(tmp_path / "whole")
    at_load = RegViTConfig.from_pretrained(tmp_path / "whole", num_hidden_layers=1)
    later = RegViTConfig(**TINY)
    later.num_hidden_layers = 1
    for i, config in enumerate((at_load, later)):
        assert (config.out_features, config.out_indices) == (["stage1"], [1])
        config.save_pretrained(tmp_path / f"{i}")
        assert RegViTConfig.from_pretrained(tmp_path / f"{i}").out_features == ["stage1"]
    deeper = RegViTConfig.from_pretrained(tmp_path / "whole", num_hidden_layers=7)
    assert (deeper.out_features, deeper.out_indices) == (["stage7"], [7])


def test_chosen_feature_maps_stay_or_are_named(tmp_path):
    config = RegViTConfig(**{**TINY, "num_hidden_layers": 3}, out_indices=[1, 3])
    config.num_hidden_layers = 4
    assert (config.out_features, config.out_indices) == (["stage1", "stage3"], [1, 3])
    config.num_hidden_layers = 2
    with pytest.raises(StrictDataclassError, match="stage3, but num_hidden_layers=2 has the stages stem to stage2"):
        config.save_pretrained(tmp_path)


def test_classes_of_somebodys_own_stay_in_the_auto_map(tmp_path):
    config = RegViTConfig(**TINY)
    config.auto_map["AutoModel"] = "my_vit.MyViT"  # as written by save_pretrained of a registered class
    config.save_pretrained(tmp_path)
    loaded = RegViTConfig.from_pretrained(tmp_path)
    assert loaded.auto_map == {**AUTO_MAP, "AutoModel": "my_vit.MyViT"}
    of_the_hub = {name: f"owner/repo--{value}" for name, value in loaded.auto_map.items()}
    from_there = RegViTConfig(**TINY, auto_map=of_the_hub)
    assert from_there.auto_map == {**AUTO_MAP, "AutoModel": "owner/repo--my_vit.MyViT"}
    assert RegViTConfig(**TINY, auto_map=None).auto_map == AUTO_MAP


# --- Sizes -----------------------------------------------------------------------------------------------------------

MANIFESTS = {"small": "vits14_reg4", "base": "vitb14_reg4", "large": "vitl14_reg4", "giant": "vitg14_reg4"}


@requires_shared
@pytest.mark.parametrize("preset", MANIFESTS)
def test_presets_have_exactly_the_parameters_of_the_released_models(preset):
    manifest = json.loads((shared_dir() / "golden" / "manifests" / f"dinov2_{MANIFESTS[preset]}.json").read_text())
    config = RegViTConfig.from_preset(preset, patch_size=14, image_size=518, use_mask_token=True)
    with torch.device("meta"):
        model = RegViTModel(config)
    assert config.num_parameters() == manifest["n_parameters"]
    assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(map(tuple, manifest["parameters"].values()))


@requires_shared
def test_preset_without_registers_has_the_parameters_of_the_released_model():
    manifest = json.loads((shared_dir() / "golden" / "manifests" / "dinov2_vits14.json").read_text())
    config = RegViTConfig.from_preset(
        "small", patch_size=14, image_size=518, use_mask_token=True, num_register_tokens=0
    )
    assert config.num_parameters() == manifest["n_parameters"]


def test_giant_is_counted_and_built_on_meta_without_memory():
    config = RegViTConfig.from_preset("giant", patch_size=14, image_size=518, use_mask_token=True)
    with torch.device("meta"):
        model = RegViTModel(config)
    assert all(p.is_meta for p in model.parameters())
    # Published number for the official giant model with 4 registers.
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters() == 1_136_486_912


@pytest.mark.parametrize(
    "fields",
    [
        TINY, EVERYTHING, {**TINY, "num_register_tokens": 0}, {**TINY, "layerscale_value": None},
        {**TINY, "use_swiglu_ffn": True}, {**TINY, "use_swiglu_ffn": True, "mlp_bias": False},
        {**TINY, "pooler_act": "tanh"}, {**TINY, "no_embed_class": True}, {**TINY, "image_size": (8, 24)},
        {**TINY, "qkv_bias": False, "num_channels": 1}, {**TINY, "final_norm": "pooled"}, PRESETS["tiny"],
    ],
)  # fmt: skip
def test_num_parameters_counts_what_is_built(fields):
    config = RegViTConfig(**fields)
    with torch.device("meta"):
        model = RegViTModel(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


def test_tiny_preset_is_deit_tiny():
    # 5,717,416 parameters with 1000 classes (arXiv 2012.12877), less the 193,000 of the classifier.
    plain = RegViTConfig.from_preset("tiny", num_register_tokens=0, layerscale_value=None)
    assert plain.num_parameters() == 5_717_416 - 193 * 1000


@pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096)])
def test_swiglu_width_of_every_published_size(width, hidden):
    assert RegViTConfig(hidden_size=width, num_attention_heads=4, use_swiglu_ffn=True).ffn_hidden_size == hidden


def test_preset_overrides_and_unknown_preset():
    config = RegViTConfig.from_preset("small", num_register_tokens=8, num_hidden_layers=3)
    assert (config.hidden_size, config.num_hidden_layers, config.num_prefix_tokens) == (384, 3, 9)
    with pytest.raises(ConfigError, match=r"'huge'.*tiny, small, base, large, giant"):
        RegViTConfig.from_preset("huge")


def test_sizes_may_be_rectangular():
    config = RegViTConfig(**{**TINY, "image_size": (16, 48), "patch_size": [8, 16]})
    assert (config.image_shape, config.patch_shape, config.grid) == ((16, 48), (8, 16), (2, 3))


def test_defaults_are_those_dinov2_trains_with():
    config = RegViTConfig()
    assert config.num_register_tokens == 4
    assert config.register_init_std == 0.02
    assert config.layer_norm_eps == 1e-6
    assert config.layerscale_value == 1e-5
    assert config.interpolate_antialias
    assert config.interpolate_offset == 0.0
    assert not config.use_mask_token
